"""Opens object stores: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

In a pod the keys are files, one for each key of the runtime's secret (docs/storage.md); on a person's machine they are
environment variables. Without keys the machine's or pod's own identity is used.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from finetune_api.errors import SpecError
from finetune_api.stage import STORAGE_SECRET_PATH

SCHEMES: Final = ("s3", "gs", "abfs", "abfss")
_CONNECT_SECONDS: Final = 10.0
_REQUEST_SECONDS: Final = 60.0
_ATTEMPTS: Final = 3  # at once, of one request; `storage` tries for longer
_GCS_RETRIES: Final = timedelta(seconds=5)  # of one request; its default is 15 minutes
_AZURE_HOST: Final = ".dfs.core.windows.net"


def secret(name: str) -> str | None:
    """A key of the mounted secret, else the environment variable of that name; read anew each time, since it may be
    rotated."""
    file = secret_file(name)
    text = os.environ.get(name) if file is None else file.read_text(encoding="utf-8")
    return text.strip() or None if text else None


def secret_file(name: str) -> Path | None:
    """The file of a key of the mounted secret."""
    file = Path(os.environ.get("FINETUNE_STORAGE_SECRET", STORAGE_SECRET_PATH)) / name
    return file if file.is_file() else None


def open_store(scheme: str, netloc: str, where: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a bucket or container, and the bucket's name in it.

    Raises:
        SpecError: the address does not say which account.
        OSError: it cannot be set up.
    """
    if scheme == "s3":
        return pafs.S3FileSystem(**s3_options(netloc)), netloc
    if scheme == "gs":
        return pafs.GcsFileSystem(**gcs_options()), netloc
    container, options = azure_options(netloc, where)
    return pafs.AzureFileSystem(**options), container


def s3_options(bucket: str) -> dict[str, Any]:
    """Arguments of S3FileSystem."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options = {
        "endpoint_override": endpoint,
        "region": region or ("us-east-1" if endpoint else pafs.resolve_s3_region(bucket)),
        "connect_timeout": _CONNECT_SECONDS,
        "request_timeout": _REQUEST_SECONDS,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        # With an endpoint pyarrow names the bucket in the path, unless it is told otherwise.
        "force_virtual_addressing": os.environ.get("FINETUNE_S3_PATH_STYLE") == "0",
    }
    if ca := os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = ca
    if key := secret("AWS_ACCESS_KEY_ID"):
        options |= {
            "access_key": key,
            "secret_key": secret("AWS_SECRET_ACCESS_KEY"),
            "session_token": secret("AWS_SESSION_TOKEN"),
        }
    return options


def gcs_options() -> dict[str, Any]:
    """Arguments of GcsFileSystem. The key's file is named to Google's library by its own environment variable."""
    if file := secret_file("GOOGLE_APPLICATION_CREDENTIALS_JSON"):
        os.environ["GOOGLE_APPLICATION_CREDENTIALS"] = str(file)
    options: dict[str, Any] = {"retry_time_limit": _GCS_RETRIES}
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        parts = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        options |= {"anonymous": True, "scheme": parts.scheme, "endpoint_override": parts.netloc}
    return options


def azure_options(netloc: str, where: str) -> tuple[str, dict[str, Any]]:
    """The container's name, and arguments of AzureFileSystem.

    Args:
        netloc: CONTAINER@ACCOUNT.dfs.core.windows.net, or CONTAINER with the account in AZURE_STORAGE_ACCOUNT.

    Raises:
        SpecError: no account is named.
    """
    container, _, host = netloc.partition("@")
    account = host.removesuffix(_AZURE_HOST).removesuffix(".blob.core.windows.net") or secret("AZURE_STORAGE_ACCOUNT")
    if not account or "." in account:
        raise SpecError(
            "the address names no storage account",
            where=where,
            hint=f"write abfs://CONTAINER@ACCOUNT{_AZURE_HOST}/KEY, or set AZURE_STORAGE_ACCOUNT",
        )
    options: dict[str, Any] = {"account_name": account} | _azure_endpoint(account)
    keys = {
        "account_key": "AZURE_STORAGE_KEY",
        "sas_token": "AZURE_STORAGE_SAS_TOKEN",
        "tenant_id": "AZURE_TENANT_ID",
        "client_id": "AZURE_CLIENT_ID",
        "client_secret": "AZURE_CLIENT_SECRET",
    }
    found = {option: value for option, name in keys.items() if (value := secret(name))}
    if "account_key" in found:
        found = {"account_key": found["account_key"]}
    elif "sas_token" in found:
        # pyarrow appends it to the URL as it is; the portal shows it with the question mark, `az` without.
        found = {"sas_token": "?" + found["sas_token"].removeprefix("?")}
    elif "client_secret" not in found:
        found = {}  # a client without a secret is a workload identity, which the library reads by itself
    return container, options | found


def _azure_endpoint(account: str) -> dict[str, str]:
    """Arguments for another Azure than the public one, or for an emulator, which has the account in the path."""
    parts = urlsplit(secret("AZURE_STORAGE_SERVICE_ENDPOINT") or "")
    if not parts.netloc:
        return {}
    blob = parts.netloc.removeprefix(account) if parts.netloc.startswith(f"{account}.") else parts.netloc
    return {
        "blob_storage_scheme": parts.scheme,
        "blob_storage_authority": blob,
        "dfs_storage_scheme": parts.scheme,
        "dfs_storage_authority": blob.replace(".blob.", ".dfs.", 1),
    }
