"""The command line, run as people run it: in a process of its own, or through `main`."""

import json
import subprocess
import sys

import pytest
from tokenloom.serve.cli import main


def test_generate_streams_text_and_reports_speed():
    done = subprocess.run(
        [sys.executable, "-m", "tokenloom.serve.cli", "generate", "import ", "--max-tokens", "12"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tokens/s" in done.stderr and "first token after" in done.stderr


def test_info_reads_the_config_alone(capsys):
    assert main(["info", "demo", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "llama" and facts["vocabulary"] == 4096
    assert 4e6 < facts["parameters"] < 8e6 and facts["max_model_len"] == 2048
    assert facts["weight_bytes"] == 4 * facts["parameters"] and "decode widths" in facts["bucket_plan"]


def test_bench_measures_a_bare_config(tmp_path, capsys):
    raw = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    assert (
        main(["bench", "--config", str(path), "--prompt-len", "8", "--output-len", "4", "--repeat", "1"]) == 0
    )
    out = capsys.readouterr().out
    assert "prefill" in out and "decode" in out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["generate", "a", "--temperature", "-1"], "temperature"),
        (["generate", "a", "--model", "no/such/model/here"], "no/such/model/here"),
        (["info", "no-such-model-here"], "no-such-model-here"),
    ],
)
def test_mistakes_end_with_one_line(arguments, reason, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenloom: ") and reason in error
