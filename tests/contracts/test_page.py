"""The page's files: which are other people's, as published; and the limits that it repeats from the API."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import simpletuner
from simpletuner.server.api.samples import SampleJobRequest

PAGE = Path(simpletuner.__file__).parent / "server" / "page"
VENDOR = PAGE / "vendor"
ROW = re.compile(r"\| (\S+) \| npm `[\w-]+` [\d.]+, `\S+` \| [^|]*?(\S+\.LICENSE) \| ([0-9a-f]{64}) \|")


def test_vendored_files_are_as_published_and_have_their_license() -> None:
    listed = {
        name: (license_name, digest) for name, license_name, digest in ROW.findall((VENDOR / "README.md").read_text())
    }
    files = {path.name for path in VENDOR.iterdir() if path.suffix in (".js", ".css")}
    assert set(listed) == files
    for name, (license_name, digest) in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
        assert (VENDOR / license_name).is_file()


def test_the_page_limits_numbers_as_the_api_does() -> None:
    text = (PAGE / "limits.js").read_text().partition("export const LIMITS = ")[2]
    on_the_page = json.loads(text.removesuffix(";\n"))
    fields = SampleJobRequest.model_json_schema()["properties"]
    assert on_the_page == {name: _limits(fields[name]) for name in on_the_page}


def _limits(schema: dict[str, Any]) -> dict[str, Any]:
    """The limits of a field as the page writes them; of a field that may be null, those of its other type."""
    kind = schema.get("anyOf", [schema])[0]
    numbers = kind.get("items", kind)
    limits = {
        "min": numbers.get("minimum"),
        "max": numbers["exclusiveMaximum"] - 1 if "exclusiveMaximum" in numbers else numbers.get("maximum"),
        "step": numbers.get("multipleOf"),
        "items": kind.get("maxItems"),
    }
    return {name: limit for name, limit in limits.items() if limit is not None}
