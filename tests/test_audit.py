""".ci/audit, with a pretended pip-audit: what it says must follow from the answer, above all from none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAFE = {"name": "rich", "version": "15.0.0", "vulns": []}
BAD = {"name": "torch", "version": "2.15.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.15.1"], "aliases": []}]}
UNKNOWN = {"name": "yarl", "skip_reason": "Dependency not found on PyPI and could not be audited: yarl (1.25.1)"}


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        ({"pypi": [SAFE, UNKNOWN]}, 0, "audit: 1 of "),
        ({"pypi": [SAFE, BAD]}, 1, "torch 2.15.0: PYSEC-1, mended by 2.15.1"),
        ({"pypi": [UNKNOWN], "osv": [SAFE]}, 0, "looked up at osv"),
        ({"pypi": [UNKNOWN], "osv": [UNKNOWN]}, 2, "nothing was looked up"),  # pip-audit itself ends with 0 here
        ({}, 2, "nothing was looked up"),
    ],
)
def test_audit_says_what_it_could_look_up(tmp_path, answers, status, said):
    pretended = tmp_path / "pip-audit"
    pretended.write_text(
        f"#!{sys.executable}\nimport json, sys\nanswers = json.loads({json.dumps(answers)!r})\n"
        "assert any(argument.endswith('constraints.txt') for argument in sys.argv)\n"
        "service = sys.argv[-1]\n"
        "if service not in answers:\n    raise ConnectionError\n"
        "print(json.dumps({'dependencies': answers[service], 'fixes': []}))\n"
    )
    pretended.chmod(0o755)
    done = subprocess.run([sys.executable, ROOT / ".ci/audit", pretended], capture_output=True, text=True, timeout=30)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
