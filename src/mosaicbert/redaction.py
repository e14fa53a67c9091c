"""Secrets out of what is written, shown or sent: by name, inside URIs, and by value.

Imports nothing heavy: the command line uses it for its error messages.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"
_NAME = re.compile(
    r"(^|_)(token|password|passwd|passphrase|credentials?|auth)$"
    r"|secret|api_?key|access_?key|private_?key|connection_string",
    re.IGNORECASE,
)
_URI_PASSWORD = re.compile(r"(\w+://[^/@:\s]+:)[^@/\s]+@")
_SIGNED_URI = re.compile(
    r"([?&](?:sig|signature|x-amz-[a-z-]+|x-goog-[a-z-]+|[a-z_]*token|[a-z_]*key)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_LEAST_LENGTH = 8
"""Of an environment variable's value that is looked for in texts."""


def redact(value: Any, key: str = "") -> Any:
    """The same nested value with everything blanked out that looks like a secret.

    By key (`api_key`, `hub_token`, `aws_secret_access_key`; not `tokenizer_name` or `eos_token_id`)
    and, in texts, as `redact_text` does.
    """
    if value is not None and _NAME.search(key):
        return REDACTED
    if isinstance(value, Mapping):
        return {name: redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """A text without passwords and signatures in URIs, and without values of secret variables.

    Secret variables are those of the environment whose name says so, such as `HF_TOKEN`: a YAML
    can bring them in with `${oc.env:HF_TOKEN}`.
    """
    text = _URI_PASSWORD.sub(rf"\1{REDACTED}@", text)
    text = _SIGNED_URI.sub(rf"\1{REDACTED}", text)
    for name, value in os.environ.items():
        if len(value) >= _LEAST_LENGTH and value in text and _NAME.search(name):
            text = text.replace(value, REDACTED)
    return text


class RedactingFormatter(logging.Formatter):
    """Log lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redact_text(super().format(record))
