"""The page's files: what of them is other people's, and that it is what they published."""

import hashlib
import re
from pathlib import Path

import simpletuner

VENDOR = Path(simpletuner.__file__).parent / "server" / "page" / "vendor"
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
