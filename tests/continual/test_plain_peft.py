"""What is shipped needs no mbf: a process in which mbf cannot be imported loads it and computes the same logits."""

import subprocess
import sys
import textwrap

import pytest
import torch

import mbf
from tests.continual.tiny import base_model, batch, logits, peft_model, train

WITHOUT_MBF = textwrap.dedent(
    """
    import sys
    sys.modules["mbf"] = None
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM
    base, adapter, inputs, out = sys.argv[1:]
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(torch.load(inputs)).logits, out)
    """
)


@pytest.mark.parametrize("name", ["slao", "olora"])
def test_another_process_without_mbf_gets_the_same_logits(name, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = peft_model()
    mbf.fuse(model)
    learner = mbf.ContinualLora(model, name)
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
    learner.save(tmp_path / "adapter")
    torch.save(batch(7)["input_ids"], tmp_path / "inputs")
    paths = [str(tmp_path / part) for part in ("base", "adapter", "inputs", "out")]
    subprocess.run([sys.executable, "-c", WITHOUT_MBF, *paths], check=True, timeout=300)
    found = torch.load(tmp_path / "out")
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    assert (found - logits(base_model())).abs().max() > 1e-3
