"""Packed checkpoints served by vLLM: `make test-vllm`, which has an environment of its own; elsewhere skipped by name.

vLLM runs in this process where that is possible, so that an error is what its user sees and not "engine core initialization
failed"; a tensor-parallel group and the server are processes of their own. Sizes are multiples of 32, which vLLM's attention
asks of heads on a CPU.
"""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")

import pytest
import torch
import transformers
from extras import needs
from families import SMALL, config, load
from safetensors.torch import load_file, save_file

import hf_littlebit
from hf_littlebit.initialize.factorize import factorize
from hf_littlebit.layers.parts import pack_parts, part_name

pytestmark = needs("vllm")

SIZES = {
    **SMALL,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "vocab_size": 256,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3_tied": ("Gemma3ForCausalLM", {"tie_word_embeddings": True}),
    "llama_bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", {"tie_word_embeddings": False}),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE),
}
PROMPTS = [[5, 9, 17, 33], [7, 100, 3, 8, 21, 60, 61], [200]]
TOKENS = 12


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """(family, options of its config, options of LittleBitConfig) -> folder of a packed random model (made once)."""
    made: dict[str, Path] = {}

    def make(family: str, sizes: dict | None = None, **options) -> Path:
        key = f"{family}{sizes}{options}"
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            name, own = FAMILIES[family]
            model_class = getattr(transformers, name)
            torch.manual_seed(0)
            dense = model_class(model_class.config_class(**{**SIZES, **own, **(sizes or {})})).eval()
            for tensor, value in dense.named_parameters():
                if tensor.endswith("bias"):
                    torch.nn.init.normal_(value, std=0.3)
                if family in ("gemma2", "gemma3_tied") and "post_" in tensor:  # else layers are not heard
                    torch.nn.init.constant_(value, 10.0)
            dense.save_pretrained(path / "dense")
            quantized = model_class.from_pretrained(path / "dense", quantization_config=config(**options))
            quantized.save_pretrained(path / "packed")
            made[key] = path / "packed"
        return made[key]

    return make


@pytest.fixture
def copy(folder, tmp_path):
    """The packed Llama in a folder that a test may damage: (folder, its tensors)."""
    path = tmp_path / "packed"
    shutil.copytree(folder("llama"), path)
    return path, load_file(path / "model.safetensors")


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )


def change_config(path: Path, **options) -> None:
    """Change what config.json says of the quantization."""
    file = path / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"].update(options)
    file.write_text(json.dumps(content))


@contextmanager
def engine(path: Path, monkeypatch, **options):
    """vLLM on a folder, in this process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True, **options}
    llm = None
    try:
        llm = LLM(str(path), skip_tokenizer_init=True, **options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def served(path: Path, monkeypatch, **options) -> list[list[int]]:
    """The tokens that vLLM gives for PROMPTS, each the likeliest."""
    with engine(path, monkeypatch, **options) as llm:
        return sampled(llm)


def sampled(llm) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def generated(path: Path) -> list[list[int]]:
    """The tokens of `generate`, which must not be all the same: then any model would do."""
    model = load(str(path), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": TOKENS, "do_sample": False}
        found.append(model.generate(tokens, pad_token_id=0, **options)[0, len(prompt) :].tolist())
    assert len({token for tokens in found for token in tokens}) > 4 and all(len(tokens) == TOKENS for tokens in found)
    return found


def refuse(path: Path, monkeypatch, words: str, **options) -> None:
    with pytest.raises(Exception, match=words), engine(path, monkeypatch, **options):
        pass


# -- the same tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3", "gemma3", "phi3", "opt"])
def test_tokens_are_those_of_generate(folder, monkeypatch, family):
    path = folder(family)
    assert served(path, monkeypatch) == generated(path)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_compiled_tokens_are_those_of_generate(folder, monkeypatch, family):
    path = folder(family)
    assert served(path, monkeypatch, enforce_eager=False) == generated(path)


def test_layers_have_as_few_bytes_as_the_file(folder, monkeypatch):
    path = folder("llama")
    with engine(path, monkeypatch) as llm:
        (sizes,) = llm.apply_model(_linear_bytes)
    report = hf_littlebit.size_report(str(path))
    assert sum(sizes) == report.quantized_bytes


def _linear_bytes(model):
    from vllm.model_executor.layers.linear import LinearBase

    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    return [value.numel() * value.element_size() for layer in layers for value in layer.parameters()]


@pytest.mark.parametrize("vocabulary", [256, 250])
def test_a_packed_output_head_is_served(folder, monkeypatch, tmp_path, vocabulary):
    path = tmp_path / "packed"
    shutil.copytree(folder("llama", {"vocab_size": vocabulary}), path)
    tensors = load_file(path / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    factors = pack_parts(factorize(head.float(), (64,), "dual_svid"), torch.bfloat16)
    write(path, {**tensors, **{f"lm_head.{part_name('weight', part)}": value for part, value in factors.items()}})
    assert served(path, monkeypatch) == generated(path)


# -- packed embeddings and heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [256, 250])
@pytest.mark.parametrize("family, bits", [("llama", (8, 4)), ("llama_tied", (4, 4)), ("gemma3_tied", (8, 8))])
def test_packed_tables_are_served(folder, monkeypatch, family, bits, vocabulary):
    path = folder(family, {"vocab_size": vocabulary}, embedding_bits=bits[0], head_bits=bits[1])
    assert served(path, monkeypatch) == generated(path)


@pytest.mark.parametrize("bits", [(16, 8), (4, 16)])
def test_one_of_the_two_is_packed(folder, monkeypatch, bits):
    path = folder("llama", embedding_bits=bits[0], head_bits=bits[1])
    assert served(path, monkeypatch) == generated(path)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_packed_tables_are_served_compiled(folder, monkeypatch, family):
    path = folder(family, embedding_bits=8, head_bits=8)
    assert served(path, monkeypatch, enforce_eager=False) == generated(path)


def test_tables_have_as_few_bytes_as_the_file(folder, monkeypatch):
    for family, tables in (("llama", 2), ("llama_tied", 1)):
        path = folder(family, embedding_bits=4, head_bits=4)
        with engine(path, monkeypatch) as llm:
            (sizes,) = llm.apply_model(_table_bytes)
        report = hf_littlebit.size_report(str(path))
        assert len(report.tables) == tables and sum(sizes) == sum(table.bytes for table in report.tables)


def _table_bytes(model):
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    held = {id(value): value for layer in layers for value in layer.parameters()}
    return [value.numel() * value.element_size() for value in held.values()]


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("skipped", [["lm_head"], ["embed_tokens"]])
def test_tables_that_are_dense_in_the_file_are_dense(folder, monkeypatch, family, skipped):
    path = folder(family, modules_to_not_convert=skipped, embedding_bits=8, head_bits=8)
    assert served(path, monkeypatch) == generated(path)


@pytest.mark.parametrize("family, name", [("opt", "model.decoder.embed_tokens"), ("gemma2", "model.embed_tokens")])
def test_tables_that_vllm_asks_no_method_for_are_refused_by_name(folder, monkeypatch, family, name):
    words = rf"{name} .*packed, but vLLM's own class of this model asks no.*`transformers serve`"
    refuse(folder(family, embedding_bits=8, head_bits=8), monkeypatch, words)


TABLE_DAMAGE = {
    "part missing": (lambda t: {k: v for k, v in t.items() if k != "lm_head.scale"}, r"lm_head\.scale"),
    "wrong shape": (
        lambda t: {**t, "lm_head.codes": t["lm_head.codes"][:, :64]},
        r"lm_head\.codes is \w+ \[256, 64\]",
    ),
    "wrong dtype": (lambda t: {**t, "lm_head.codes": t["lm_head.codes"].int()}, r"lm_head\.codes is \w+32 "),
    "fewer rows": (
        lambda t: {**t, "model.embed_tokens.codes": t["model.embed_tokens.codes"][:200]},
        r"model\.embed_tokens\.codes is \w+ \[200, 128\]",
    ),
    "not a number": (lambda t: {**t, "lm_head.scale": t["lm_head.scale"] / 0}, r"lm_head\.scale holds NaN or Inf"),
}


@pytest.mark.parametrize("looked_at", [True, False])
@pytest.mark.parametrize("damage", TABLE_DAMAGE)
def test_damaged_tables_are_refused_in_our_words(folder, monkeypatch, tmp_path, damage, looked_at):
    """Before the engine starts, and, as for a model from the Hub, while it is loaded."""
    from hf_littlebit.engines.vllm_config import LittleBitQuantization

    path = tmp_path / "packed"
    shutil.copytree(folder("llama", embedding_bits=8, head_bits=8), path)
    change, words = TABLE_DAMAGE[damage]
    write(path, change(load_file(path / "model.safetensors")))
    if not looked_at:
        monkeypatch.setattr(LittleBitQuantization, "maybe_update_config", lambda *args, **options: None)
        words = words.replace(
            r"model\.embed_tokens\.", r"the embedding\."
        )  # vLLM does not tell a Llama's embedding its name
    refuse(path, monkeypatch, words)


# -- what is dense in the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "skipped",
    [["down_proj"], ["q_proj", "k_proj", "v_proj"], [r"model\.layers\.0"], ["mlp"], ["model.layers.1.self_attn"]],
)
def test_layers_that_the_user_left_dense_are_dense(folder, monkeypatch, skipped):
    path = folder("llama", modules_to_not_convert=skipped)
    assert served(path, monkeypatch) == generated(path)


def test_layers_that_no_list_names_are_dense_where_the_file_says_so(folder, monkeypatch):
    path = folder("llama", modules_to_not_convert=["down_proj", "q_proj", "k_proj", "v_proj"])
    change_config(path, modules_to_not_convert=None)
    assert served(path, monkeypatch) == generated(path)


@pytest.mark.parametrize("listed", [True, False])
def test_a_merged_layer_that_is_dense_in_part_is_refused_by_name(folder, monkeypatch, tmp_path, listed):
    path = tmp_path / "packed"
    shutil.copytree(folder("llama", modules_to_not_convert=["layers.1.self_attn.k_proj"]), path)
    if not listed:
        change_config(path, modules_to_not_convert=None)
    words = r"layers\.1\.self_attn\.k_proj is dense .*layers\.1\.self_attn\.q_proj, .*v_proj packed.*qkv_proj"
    refuse(path, monkeypatch, words)


def test_packed_experts_are_refused_by_name(folder, monkeypatch):
    refuse(folder("qwen3_moe"), monkeypatch, r"layers\.0\.mlp\.experts\.\w+ is packed.*linear layers only")


def test_dense_experts_beside_packed_attention_are_served(folder, monkeypatch):
    path = folder("qwen3_moe", modules_to_not_convert=["experts"])
    assert served(path, monkeypatch) == generated(path)


# -- what is refused ----------------------------------------------------------------------------------------------------------

PART = "model.layers.1.self_attn.q_proj.v"


def truncate(path, tensors):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def scramble(path, tensors):
    file = path / "model.safetensors"
    file.write_bytes(b"\xff" * 40 + file.read_bytes()[40:])


def remove(path, tensors):
    (path / "model.safetensors").unlink()


DAMAGE = {
    "truncated": (truncate, "model.safetensors is damaged"),
    "scrambled": (scramble, "model.safetensors is damaged"),
    "no file": (remove, "holds no model.safetensors"),
    "part missing": (lambda p, t: write(p, {k: v for k, v in t.items() if k != PART}), r"q_proj\.v"),
    "dense missing": (
        lambda p, t: write(p, {k: v for k, v in t.items() if k != "model.norm.weight"}),
        r"model\.norm\.weight",
    ),
    "wrong shape": (lambda p, t: write(p, {**t, PART: t[PART][:, 1:]}), rf"{PART} is I32"),
    "wrong dtype": (lambda p, t: write(p, {**t, PART: t[PART].long()}), rf"{PART} is I64"),
    "not a number": (
        lambda p, t: write(
            p, {**t, "model.layers.0.mlp.up_proj.scale_in": t["model.layers.0.mlp.up_proj.scale_in"] * torch.nan}
        ),
        r"up_proj\.scale_in holds NaN or Inf",
    ),
    "newer format": (lambda p, t: change_config(p, format_version=99), "format version 99"),
    "latents": (lambda p, t: change_config(p, format="latent"), "latent factors"),
    "unknown option": (lambda p, t: change_config(p, colour="red"), "unknown LittleBitConfig option 'colour'"),
    "no bpw": (lambda p, t: change_config(p, bpw=None, share_inputs=True), "no bpw"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_our_words(copy, monkeypatch, damage):
    path, tensors = copy
    change, words = DAMAGE[damage]
    change(path, tensors)
    refuse(path, monkeypatch, words)


@pytest.mark.parametrize("damage", ["part missing", "wrong shape", "wrong dtype"])
def test_what_was_not_looked_at_before_is_refused_while_loading(copy, monkeypatch, damage):
    """As for a model from the Hub, which is not there yet when vLLM asks about it first."""
    from hf_littlebit.engines.vllm_config import LittleBitQuantization

    monkeypatch.setattr(LittleBitQuantization, "maybe_update_config", lambda *args, **options: None)
    path, tensors = copy
    DAMAGE[damage][0](path, tensors)
    refuse(path, monkeypatch, r"model\.layers\.1\.self_attn\.q_proj\.v is .*damaged or incomplete")
    write(path, {name: value for name, value in tensors.items() if not name.startswith("model.layers.0.mlp.up_proj")})
    refuse(path, monkeypatch, r"model\.layers\.0\.mlp\.up_proj is not in the checkpoint")


# -- processes ----------------------------------------------------------------------------------------------------------------


def test_the_quantization_travels_to_the_engines_process():
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = get_quantization_config("littlebit").from_config(
        {"quant_method": "littlebit", "bpw": 0.5, "format_version": 1}
    )
    again = pickle.loads(pickle.dumps(found))
    assert again.get_name() == "littlebit" and again.config.to_dict() == found.config.to_dict()


OWN = """
import json, sys
sys.path.insert(0, sys.argv[3])
from test_vllm import sampled
if __name__ == "__main__":
    from vllm import LLM
    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True, **json.loads(sys.argv[2])}
    print("tokens:", json.dumps(sampled(LLM(sys.argv[1], skip_tokenizer_init=True, **options))))
"""


def output_of_own_process(path: Path, tmp_path: Path, **options) -> str:
    """What a program that asks vLLM for tokens prints; the engine is started as a process, or two, of its own."""
    script = tmp_path / "own.py"
    script.write_text(OWN)
    environment = dict(os.environ)
    if options.get("tensor_parallel_size"):
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if (os.cpu_count() or 1) > 1 else "0|0"
    command = [sys.executable, str(script), str(path), json.dumps(options), str(Path(__file__).parent)]
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            process.wait(timeout=1800)
        finally:
            with suppress(ProcessLookupError):  # the engine's processes outlive one that is killed
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        return output.read()


def served_apart(path: Path, tmp_path: Path, **options) -> list[list[int]]:
    output = output_of_own_process(path, tmp_path, **options)
    lines = [line for line in output.splitlines() if line.startswith("tokens:")]
    assert lines, output[-4000:]
    return json.loads(lines[0].removeprefix("tokens:"))


def test_transformers_own_modules_are_served_too(folder, tmp_path):
    """Apart, because vLLM changes the classes of transformers for it."""
    path = folder("llama_bias")
    assert served_apart(path, tmp_path, model_impl="transformers") == generated(path)


@pytest.mark.parametrize("family, heads", [("llama", 2), ("phi3", 2), ("llama", 1)])
def test_two_processes_give_the_tokens_of_one(folder, tmp_path, family, heads):
    path = folder(family, {"num_key_value_heads": heads})
    assert served_apart(path, tmp_path, tensor_parallel_size=2) == generated(path)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_two_processes_share_the_rows_of_tables(folder, tmp_path, family):
    path = folder(family, {"num_key_value_heads": 2, "vocab_size": 250}, embedding_bits=8, head_bits=8)
    assert served_apart(path, tmp_path, tensor_parallel_size=2) == generated(path)


@pytest.mark.parametrize("family", ["gemma2", "llama_tied"])
def test_transformers_own_modules_have_tables_too(folder, tmp_path, family):
    path = folder(family, embedding_bits=8, head_bits=8)
    assert served_apart(path, tmp_path, model_impl="transformers") == generated(path)


def test_inputs_that_two_processes_cannot_share_are_refused_with_the_sizes(folder, tmp_path):
    output = output_of_own_process(folder("llama", {"intermediate_size": 288}), tmp_path, tensor_parallel_size=2)
    assert "down_proj has 288 inputs, of which each of 2 processes would keep 144" in output, output[-4000:]


@contextmanager
def server(path: Path, log: Path):
    """vLLM's server on a free port, killed at the end; gives its address.

    The command `vllm` itself does not start where vLLM is installed as vllm-cpu: it asks for the version of "vllm".
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"
    program = [sys.executable, "-m", module, "--model", str(path), "--host", "127.0.0.1", "--port", str(port)]
    options = [
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
        "--enforce-eager",
        "--served-model-name",
        "small",
    ]
    with log.open("w") as output:
        process = subprocess.Popen([*program, *options], stdout=output, stderr=output, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    with urlopen(f"{url}/health", timeout=1):
                        break
                except (URLError, OSError):
                    time.sleep(1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@needs("openai")
def test_a_server_answers_the_openai_client_and_starts_again_after_it_was_killed(pycode, tmp_path):
    from openai import OpenAI

    path = tmp_path / "pycode"
    model = transformers.AutoModelForCausalLM.from_pretrained(pycode, quantization_config=config(bpw=1.0))
    model.save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pycode)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    messages = [{"role": "user", "content": "def read_lines(path):"}]
    tokens = tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False, return_tensors="pt"
    )
    model = load(str(path), dtype=torch.float32)
    wanted = model.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    text = tokenizer.decode(wanted, skip_special_tokens=True)
    for run in range(2):
        with server(path, tmp_path / f"log{run}") as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
            options = {"model": "small", "messages": messages, "max_tokens": 16, "temperature": 0}
            assert client.chat.completions.create(**options).choices[0].message.content == text
            pieces = [
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)
            ]
            assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 1
