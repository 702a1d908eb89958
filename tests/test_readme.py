"""What README and docs tell to type works as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("stdin", [False, True], ids=["file", "standard input"])
def test_the_python_example_runs_as_a_script(tmp_path, stdin):
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "__main__" not in text
    short = re.sub(r"rounds=\d+", "rounds=2", text)
    assert short != text
    (tmp_path / "example.py").write_text(short)
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-" if stdin else "example.py"], input=short if stdin else None, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    accuracy, sent = done.stdout.split()
    assert 0 < float(accuracy) <= 1
    assert int(sent) > 0
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()


def test_a_comparison_is_played_from_a_script_too(tmp_path):
    (tmp_path / "example.py").write_text(
        """
from pathlib import Path
from secateur import compare
from secateur.suite import Suite

common = {"data.clients": 3, "rounds": 1, "model.name": "mlp", "model.options.hidden": "[8]", "training.epochs": 1}
suite = Suite.model_validate({
    "source": "digits", "seeds": [0], "partitions": ["iid"], "common": common, "controls": [],
    "variants": {"plain": {"method": "fedavg"}},
})
print(len(compare.play(suite, Path("out"), jobs=1)))
"""
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 1
