"""Runs code in a process that has transformers but can't import grm_hf: what a user without the package has."""

import json
import os
import subprocess
import sys
from pathlib import Path


# After this every import of grm_hf fails.
_BLOCK = "import sys; sys.modules['grm_hf'] = None\n"


def run_clean(code, tmp_path: Path):
    """Run `code`, which must assign `result`, and give that back through JSON."""
    script = tmp_path / "clean.py"
    script.write_text(_BLOCK + code + "\nimport json\nprint('RESULT' + json.dumps(result))\n", encoding="utf-8")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.rsplit("RESULT", 1)[1])
