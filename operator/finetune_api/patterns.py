"""The patterns of text fields, and the words that say them.

They stand in the CRDs too, so they use only what Rust's (Pydantic's) and Go's regular expressions share.
"""

from __future__ import annotations

from typing import Final

DURATION: Final = r"^([0-9]{1,6}d)?([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"
PRINTABLE: Final = r"^[^\x00-\x1f\x7f-\x9f]*$"  # nothing that breaks a log line or drives a terminal
ADDRESS: Final = r"^[^\x00-\x20\x7f-\x9f]+$"
BUCKET_ADDRESS: Final = r"^(s3|gs|abfs|abfss)://[^\x00-\x20\x7f-\x9f]+$"
NAME: Final = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
JOB_NAME: Final = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
FILE_KEY: Final = r"^[-._a-zA-Z0-9]+$"
LABEL_KEY: Final = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
LABEL_VALUE: Final = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
IMAGE: Final = r"^[a-z0-9][A-Za-z0-9._/:@-]*$"
MEMORY_SIZE: Final = r"^[1-9][0-9]{0,5}(Mi|Gi)$"
CURRENCY: Final = r"^[A-Z]{3}$"
CIDR: Final = r"^([0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9a-fA-F:]+)/[0-9]{1,3}$"
ENDPOINT: Final = r"^https?://[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]{1,5})?$"
SHA256: Final = r"^[0-9a-f]{64}$"
COMMIT: Final = r"^[0-9a-f]+$"
TIMESTAMP: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})$"
REASON: Final = r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"  # metav1.Condition
CONDITION_TYPE: Final = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$"
)

# What a user may get wrong; the rest is written by the operator alone.
WORDS: Final[dict[str, str]] = {
    DURATION: "must be a duration such as 90s, 30m, 1h30m or 2d",
    PRINTABLE: "must be one line without control characters",
    ADDRESS: "must be an address without spaces or control characters",
    BUCKET_ADDRESS: "must be an address in a bucket, such as s3://BUCKET/KEY",
    NAME: "must be lower-case letters, digits and -, with a letter or digit at both ends",
    JOB_NAME: "must be lower-case letters, digits and -, with a letter first and a letter or digit last",
    FILE_KEY: "must be letters, digits, -, _ and .",
    LABEL_KEY: "must be a label key such as nvidia.com/gpu.product",
    LABEL_VALUE: "must be letters, digits, -, _ and ., with a letter or digit at both ends",
    IMAGE: "must be an image such as registry.example.com/finetune/trainer:0.1.0",
    MEMORY_SIZE: "must be a size such as 512Mi or 8Gi",
    CURRENCY: "must be an ISO 4217 code such as USD or EUR",
    CIDR: "must be a range of addresses such as 10.20.0.0/16",
    ENDPOINT: "must be http:// or https:// with host and port only, such as https://minio.storage.svc:9000",
}
