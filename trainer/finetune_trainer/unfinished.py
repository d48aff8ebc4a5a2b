"""Ends multipart uploads that a killed process left in an S3 bucket: their parts are not listed, and cost.

pyarrow can neither list nor end them, so these two requests are signed here
(https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html). That takes keys; with an identity of
the pod's own a lifecycle rule of the bucket does it (docs/storage.md).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit

from finetune_trainer.storage import Location, explained
from finetune_trainer.stores import s3_options, secret

_SECONDS: Final = 60.0
_EMPTY: Final = hashlib.sha256(b"").hexdigest()


def end_unfinished(folder: Location) -> int:
    """Ends every unfinished upload below a folder that nobody else writes to now; how many there were.

    Does nothing where there is none to end: on disks, in other stores than S3, without keys.

    Raises:
        StorageError: the store refuses.
    """
    if not folder.uri.startswith("s3://") or secret("AWS_ACCESS_KEY_ID") is None:
        return 0
    bucket, _, key = folder.path.partition("/")
    ended = 0
    with explained(folder.uri):
        while found := _unfinished(bucket, f"{key}/"):
            for name, upload in found:
                _request("DELETE", bucket, name, {"uploadId": upload})
            ended += len(found)
    return ended


def _unfinished(bucket: str, prefix: str) -> list[tuple[str, str]]:
    """Key and upload id of at most 1,000."""
    answer = ET.fromstring(_request("GET", bucket, "", {"prefix": prefix, "uploads": ""}))
    space = answer.tag.partition("}")[0] + "}" if answer.tag.startswith("{") else ""
    uploads = answer.findall(f"{space}Upload")
    return [(u.findtext(f"{space}Key", ""), u.findtext(f"{space}UploadId", "")) for u in uploads]


def _request(method: str, bucket: str, key: str, query: dict[str, str]) -> bytes:
    options = s3_options(bucket)
    region = str(options["region"])
    endpoint = options["endpoint_override"]
    parts = urlsplit(endpoint or f"https://s3.{region}.amazonaws.com")
    in_host = endpoint is None or options["force_virtual_addressing"]
    host = f"{bucket}.{parts.netloc}" if in_host else parts.netloc
    path = quote(f"/{key}" if in_host else f"/{bucket}/{key}".removesuffix("/"), safe="/~")
    asked = "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in sorted(query.items()))
    headers = _signed(method, host, path or "/", asked, region)
    request = urllib.request.Request(f"{parts.scheme}://{host}{path}?{asked}", method=method, headers=headers)
    context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS, context=context) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        if method == "DELETE" and error.code == 404:
            return b""  # it has ended by itself
        raise OSError(f"AWS Error: HTTP status {error.code} for {method}") from None


def _signed(method: str, host: str, path: str, query: str, region: str) -> dict[str, str]:
    """Headers with the signature of a request without a body."""
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": host, "x-amz-content-sha256": _EMPTY, "x-amz-date": time}
    if token := secret("AWS_SESSION_TOKEN"):
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join((method, path, query, lines, names, _EMPTY))
    scope = f"{time[:8]}/{region}/s3/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", time, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{secret('AWS_SECRET_ACCESS_KEY')}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    credential = f"{secret('AWS_ACCESS_KEY_ID')}/{scope}"
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
    return headers
