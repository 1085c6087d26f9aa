"""Every verb on a GPU, as typed: processes that end well and warn of nothing. A rehearsal calls them in this one."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

from muonlm.cli.main import main

pytestmark = pytest.mark.cuda
MUONLM = [sys.executable, "-m", "muonlm"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone", "-m", "muonlm"]


class Verbs:
    """Commands that run side by side in `folder`; `here`: one after another, in this process."""

    def __init__(self, folder, here: bool):
        self.folder, self.here, self.running, self.said = folder, here, {}, {}

    def start(self, name: str, *argv, program=MUONLM, stdin: str = "") -> None:
        argv = [str(word) for word in argv]
        if self.here:
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
                assert main(argv) == 0, name
            self.said[name] = out.getvalue()
            return
        files = {kind: open(self.folder / f"{name}.{kind}", "w+") for kind in ("stdout", "stderr")}
        process = subprocess.Popen([*program, *argv], stdin=subprocess.PIPE, text=True, cwd=self.folder, **files)
        process.stdin.write(stdin)
        process.stdin.close()
        self.running[name] = process

    def ended(self) -> dict[str, str]:
        """What each said; a failure or a warning of any is one of the test."""
        try:
            for name, process in self.running.items():
                code = process.wait(240)
                self.said[name], errors = (
                    (self.folder / f"{name}.{kind}").read_text() for kind in ("stdout", "stderr")
                )
                assert code == 0, f"{name}: exit code {code}: {errors[-2000:]}"
                loud = [line for line in errors.splitlines() if "warn" in line.lower() or "Traceback" in line]
                assert not loud, f"{name}: {loud}"
        finally:
            for process in self.running.values():
                process.kill()
        self.running = {}
        return self.said


def test_every_verb_works_as_a_process_and_warns_of_nothing(device, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [
        [{"role": "user", "content": f"What is {a} + 1?"}, {"role": "assistant", "content": f"It is {a + 1}."}]
        for a in range(200)
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"conversations": both}) for both in turns))
    train = "train quickstart --smoke --data.tokenizer byte --data.val tail:0.1 --eval.sample 8".split()
    train += ["--train.device", device.type, "--train.dtype", "auto", "--train.steps", "20"]
    sft = "--train.objective sft --data.template qa --model.pattern MA --train.recompute true".split()
    verbs = Verbs(tmp_path, here=device.type == "cpu")
    verbs.start("train", *train, "--data", text, "--out", "text", "--model.pattern", "Mg")
    verbs.start("sft", *train, "--data", "talk.jsonl", "--out", "talk", *sft)
    verbs.start("torchrun", *train, "--data", text, "--out", "ranks", program=TORCHRUN)
    verbs.start("doctor", "doctor")
    said = verbs.ended()
    assert f" on {device.type}" in said["train"] and "held-out loss" in said["sft"] and "done: 20" in said["torchrun"]
    if device.type == "cuda":
        assert "bfloat16 (GPU supports it)" in said["train"] and "GiB" in said["doctor"]
    verbs.start("resume", "train", "--resume", "ranks", "--train.steps", "24")
    verbs.start("eval", "eval", "text", "talk", "--device", device.type)
    verbs.start("generate", *"generate text --prompt Every --samples 2 --device".split(), device.type)
    verbs.start("chat", *"chat talk --max-tokens 8 --device".split(), device.type, stdin="What is 3 + 1?\n")
    verbs.start("info", "info", "text")
    said = verbs.ended()
    assert "resumed at step 20" in said["resume"] and "val_loss" in said["eval"] and "Assistant: " in said["chat"]
    assert said["generate"].startswith("Every") and "next sample" in said["generate"] and "mamba" in said["info"]
    assert os.listdir("talk/evals") and os.listdir("text/evals")
