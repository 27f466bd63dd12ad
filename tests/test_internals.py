"""Private doors: that each exists in the packages that are installed, and does what its text says. One test per door."""

import os
import subprocess
import sys

import accelerate
import pytest
import torch
import transformers
from families import FAMILIES, SMALL, build, load, logits
from safetensors.torch import save_file
from test_card import stub_hub
from torch import nn
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.quantizers import auto

from hf_littlebit.internals import accelerate as accelerate_doors
from hf_littlebit.internals import torch as torch_doors
from hf_littlebit.internals import transformers as doors
from hf_littlebit.internals import transformers_generation as generation_doors

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
TOKENS = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


def forbidden(*args, **kwargs):
    raise AssertionError("this was to be passed by")


# -- transformers: registering and what a model says ------------------------------------------------------------------------


def test_a_trainer_uses_one_gpu_of_several(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    for found in (3, 1, 0):
        arguments._n_gpu = found
        assert arguments.n_gpu == found
        doors.train_on_one_gpu(arguments)
        assert arguments.n_gpu == min(1, found)


def test_register_makes_a_method_and_lets_it_override_loading_options(monkeypatch):
    for name in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        monkeypatch.setattr(auto, name, dict(getattr(auto, name)))
    monkeypatch.setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", auto.LOADING_ATTRIBUTES_CONFIG_TYPES)

    class Config(transformers.utils.quantization_config.QuantizationConfigMixin):
        def __init__(self, option="saved", **kwargs):
            self.quant_method, self.option = "of_this_test", option

        def get_loading_attributes(self):
            return {"option": self.option}

    class Quantizer(transformers.quantizers.HfQuantizer):
        is_trainable = False

        def is_serializable(self):
            return False

    for _ in range(2):
        doors.register("of_this_test", Config, Quantizer)
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(Config) == 1
    saved = {"quant_method": "of_this_test", "option": "saved"}
    assert type(auto.AutoHfQuantizer.from_config(saved, pre_quantized=True)) is Quantizer
    assert auto.AutoHfQuantizer.merge_quantization_configs(saved, Config("given")).option == "given"


def test_tied_weights_are_those_of_one_memory():
    model = build("llama_tied")
    ((target, source),) = doors.tied_weights(model).items()
    assert model.get_parameter(target) is model.get_parameter(source)
    assert source == "model.embed_tokens.weight"
    assert doors.tied_weights(build("llama")) == {} == doors.tied_weights(nn.Linear(2, 2))


def test_what_may_be_missing_is_not_reported(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    lacking = {name: value for name, value in model.state_dict().items() if not name.endswith("query.bias")}

    class Computed(type(model)):
        _keys_to_ignore_on_load_missing = (r"query\.bias",)

    for model_class, reported in ((type(model), True), (Computed, False)):
        found, said = model_class.from_pretrained(
            None, config=model.config, state_dict=dict(lacking), output_loading_info=True
        )
        assert doors.may_be_missing(found) == ([] if reported else [r"query\.bias"])
        assert any(name.endswith("query.bias") for name in said["missing_keys"]) == reported
    assert doors.may_be_missing(nn.Linear(2, 2)) == []


def test_fp32_modules_stay_so_when_a_model_is_loaded_in_16_bits(tmp_path):
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert doors.fp32_modules(model) == {"wo"}
    kept = {name.split(".")[-2] for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert kept == {"wo"}
    assert doors.fp32_modules(nn.Linear(2, 2)) == set()


def test_adapters_are_seen_however_they_were_attached():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = build("llama")
    assert not doors.has_adapters(model)
    assert doors.has_adapters(peft.get_peft_model(build("llama"), options))
    try:
        model.add_adapter(options)
    except (ImportError, ValueError) as error:  # transformers 5.24 wants a PEFT that is newer than the newest
        pytest.skip(str(error))
    assert doors.has_adapters(model)


# -- transformers: loading and saving ---------------------------------------------------------------------------------------


def test_a_marked_parameter_is_not_drawn_at_random():
    from transformers import initialization

    for value, changed in ((nn.Parameter(torch.zeros(4)), True), (nn.Parameter(torch.zeros(4)), False)):
        if not changed:
            assert doors.marked_initialized(value) is value
        with torch.no_grad():
            initialization.normal_(value)
        assert bool(value.any()) == changed


def test_the_check_before_random_numbers_runs_once_and_before_them(monkeypatch):
    model = build("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    state = {key: value for key, value in model.state_dict().items() if key != name}
    seen = []

    class Checked(type(model)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            doors.before_random_fill(self, lambda info: seen.append((self, set(info.missing_keys), drawn[:])))

    drawn = []
    plain = transformers.PreTrainedModel._init_weights
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "_init_weights",
        lambda self, module: [drawn.append(module), plain(self, module)][1],
    )
    loaded = Checked.from_pretrained(None, config=model.config, state_dict=state)
    assert seen == [(loaded, {name}, [])] and drawn
    assert "mark_tied_weights_as_initialized" not in vars(loaded)


def test_a_model_of_just_this_class():
    config = transformers.LlamaConfig(**SMALL, dtype=torch.bfloat16)
    for model_class in (transformers.LlamaForSequenceClassification, transformers.LlamaModel):
        model = doors.empty_of_class(model_class, config)
        assert type(model) is model_class and model.dtype == torch.bfloat16
        assert generation_doors.attention_implementation(model.config) == "sdpa"


def test_models_are_whole_inside_of_the_block():
    from transformers.integrations import deepspeed

    class Training:  # transformers refers to it weakly, as to a Trainer's config
        def is_zero3(self):
            return True

    training = Training()
    deepspeed.set_hf_deepspeed_config(training)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(KeyError), doors.whole_models():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            raise KeyError
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_tensors_are_saved_under_the_names_that_they_have(family_dir, tmp_path):
    model = load(family_dir("mixtral"))

    def saved(folder):
        from safetensors import safe_open

        model.save_pretrained(tmp_path / folder)
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            return set(file.keys())

    assert any("block_sparse_moe" in name for name in saved("older"))
    doors.save_under_held_names(model)
    assert saved("held") == set(model.state_dict())
    doors.plain_saving(model)
    assert any("block_sparse_moe" in name for name in saved("again"))


def test_save_pretrained_comes_by_our_saving_and_the_plain_one_saves(tmp_path):
    model, called = build("llama"), []

    def save(owner, folder, **options):
        called.append((owner, folder, options))
        doors.plain_save(owner, folder, **options)

    doors.save_through(model, save)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert called == [(model, tmp_path, {"max_shard_size": "20KB"})]
    assert "model.safetensors.index.json" in os.listdir(tmp_path)
    doors.plain_saving(model)
    assert "save_pretrained" not in vars(model)


def test_push_to_hub_comes_by_our_upload_and_the_plain_one_uploads(monkeypatch, tmp_path):
    hub = stub_hub(monkeypatch, tmp_path)
    model = build("llama")

    def upload(owner, folder, repo_id, *args, **kwargs):
        assert owner is model and "config.json" in os.listdir(folder)
        with open(os.path.join(folder, "README.md"), "w") as file:
            file.write("ours")
        return doors.plain_upload(model, folder, repo_id, *args, **kwargs)

    doors.upload_through(model, upload)
    model.push_to_hub("me/some-model")
    assert hub.files["README.md"] == b"ours" and {"config.json", "model.safetensors"} <= hub.files.keys()
    doors.plain_saving(model)
    assert "_upload_modified_files" not in vars(model)


# -- transformers: layers and generating --------------------------------------------------------------------------------------


def test_the_gate_of_experts_is_that_of_their_own_forward():
    experts = build("mixtral").model.layers[0].mlp.experts
    assert doors.gates_its_experts(type(experts)) and not doors.gates_its_experts(nn.Linear)
    with torch.no_grad():
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        one = torch.ones(3, 1)
        expected = experts(x, torch.zeros(3, 1, dtype=torch.long), one)
        inner = doors.apply_gate(type(experts), experts, x @ experts.gate_up_proj[0].T)
        torch.testing.assert_close(inner @ experts.down_proj[0].T, expected)


def test_the_attention_in_use_is_the_one_that_was_asked_for(family_dir):
    for asked in ("eager", "sdpa"):
        model = load(family_dir("llama"), attn_implementation=asked)
        assert generation_doors.attention_implementation(model.config) == asked
    model.set_attn_implementation("eager")
    assert generation_doors.attention_implementation(model.config) == "eager"


def test_which_models_take_an_attention_of_another(monkeypatch):
    assert generation_doors.takes_attention(build("llama"))
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "attention_types": [[["global"], 1]], "vocab_size": 16}
    assert not generation_doors.takes_attention(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes)))
    if hasattr(
        transformers, "DeepseekV32ForCausalLM"
    ):  # which leaves its selection of keys out under names it does not know
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 16,
            "n_routed_experts": 2,
        }
        with torch.device("meta"):
            sparse = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**sizes))
        assert not generation_doors.takes_attention(sparse)
    typed = type("Typed", (transformers.LlamaForCausalLM,), {"__module__": "a_module_without_source"})
    monkeypatch.setitem(sys.modules, "a_module_without_source", type(sys)("a_module_without_source"))
    assert typed._can_set_attn_implementation() and not generation_doors.takes_attention(typed(build("llama").config))
    towers = build("llama")
    monkeypatch.setattr(type(towers.config), "sub_configs", {"text_config": type(towers.config)})
    assert not generation_doors.takes_attention(towers)


def test_which_models_can_be_compiled_whole():
    assert generation_doors.compiles_whole(build("llama"))
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "attention_types": [[["global"], 1]], "vocab_size": 16}
    assert not generation_doors.compiles_whole(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes)))


def test_generate_remembers_the_longest_static_cache():
    model = build("llama")
    assert generation_doors.longest_cache(model) == 0
    lengths = []
    for new in (20, 5, 30):
        options = {"max_new_tokens": new, "cache_implementation": "static", "disable_compile": True, "do_sample": False}
        out = model.generate(**TOKENS, eos_token_id=None, return_dict_in_generate=True, **options)
        cache = next(out[name] for name in ("cache", "past_key_values") if name in out)
        assert cache.layers[0].max_cache_len == generation_doors.longest_cache(model)
        lengths.append(generation_doors.longest_cache(model))
    assert lengths[0] == lengths[1] < lengths[2]


def test_generate_asks_the_instance_for_its_cache_with_all_decided():
    model, asked = build("llama"), []

    def prepare(*args, **kwargs):
        asked.append(generation_doors.cache_request(model, args, kwargs))
        return getattr(type(model), generation_doors.PREPARE_CACHE)(model, *args, **kwargs)

    setattr(model, generation_doors.PREPARE_CACHE, prepare)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    model.generate(**TOKENS, **options)
    (request,) = asked
    assert request["generation_mode"] == transformers.generation.GenerationMode.SAMPLE
    assert request["batch_size"] == 1 and request["max_cache_length"] in (6, 7)
    assert (
        isinstance(request["generation_config"], GenerationConfig) and request["generation_config"].max_new_tokens == 4
    )
    assert request["generation_config"] is not model.generation_config  # it is changed for one call
    assert request["model_kwargs"]["use_cache"] is True


def test_prefill_reads_the_prompt_with_an_empty_cache():
    model, asked = build("llama"), []

    def read(*args, **kwargs):
        asked.append(generation_doors.prompt_request(model, args, kwargs))
        return getattr(type(model), generation_doors.PREFILL)(model, *args, **kwargs)

    setattr(model, generation_doors.PREFILL, read)
    model.generate(**TOKENS, max_new_tokens=4, cache_implementation="static")
    (request,) = asked
    assert torch.equal(request["input_ids"], TOKENS["input_ids"]) and request["is_first_iteration"] is True
    assert request["generation_config"].prefill_chunk_size is None
    inputs = request["model_kwargs"]
    cache = inputs.get("cache", inputs.get("past_key_values"))
    assert isinstance(cache, StaticCache) and inputs["logits_to_keep"] == 1

    class Own(type(model)):
        def _prefill(self, *args, **kwargs):
            return super()._prefill(*args, **kwargs)

    model.__class__ = Own
    assert generation_doors.prompt_request(model, (), {}) is None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_all_that_a_static_layer_remembers_is_known(family):
    options = {**SMALL, **FAMILIES[family][1], "sliding_window": 8}
    config = getattr(transformers, FAMILIES[family][0]).config_class(**options)
    cache = StaticCache(config=config, max_cache_len=16)
    assert not any(generation_doors.has_unknown_state(layer) for layer in cache.layers)
    model = getattr(transformers, FAMILIES[family][0])(config).eval()
    name = next(name for name in ("cache", "past_key_values") if name in tuple(model(torch.tensor([[1]])).keys()))
    model(**TOKENS, **{name: cache})
    assert not any(generation_doors.has_unknown_state(layer) for layer in cache.layers)
    cache.layers[0].more = 1
    assert generation_doors.has_unknown_state(cache.layers[0])
    assert generation_doors.has_unknown_state(transformers.DynamicCache(config=config).layers[0])


def test_the_hooks_that_collect_hidden_states_stay_and_are_known():
    model = build("llama")
    with torch.no_grad():
        model(**TOKENS, output_hidden_states=True)
    left = [hook for module in model.modules() for hook in torch_doors.module_hooks(module)]
    assert left and all(generation_doors.is_quiet_hook(hook) for hook in left)
    assert not generation_doors.is_quiet_hook(lambda *args: None)


def test_generate_compiles_on_a_cpu_where_it_was_told_to(monkeypatch):
    model, compiled = build("llama"), []
    monkeypatch.setattr(
        type(model), "get_compiled_call", lambda self, config: [compiled.append(config), self.__call__][1]
    )
    for told in (False, True):
        config = CompileConfig(backend="eager", mode=None)
        if told:
            generation_doors.compile_on_every_device(config)
        model.generate(**TOKENS, max_new_tokens=3, cache_implementation="static", compile_config=config)
        assert bool(compiled) == told


# -- torch ------------------------------------------------------------------------------------------------------------------


class Counter(torch_doors.TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_operators_and_is_seen():
    assert not torch_doors.operators_are_watched() and not torch_doors.is_watched()
    with Counter() as counter:
        assert torch_doors.operators_are_watched() and torch_doors.is_watched()
        torch.ones(2) + 1
    assert counter.count == 2 and not torch_doors.operators_are_watched()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_the_transforms_of_torch_func_are_seen(transform):
    found = []

    def function(x):
        found.append((torch_doors.in_function_transform(), torch_doors.is_watched()))
        return x.sum()

    transform(function)(torch.ones(3))
    assert found == [(True, True)]
    assert not torch_doors.in_function_transform() and not torch_doors.is_watched()


def test_forward_derivatives_and_traces_are_seen():
    with torch.autograd.forward_ad.dual_level():
        assert torch_doors.is_watched()
    assert not torch_doors.is_watched()
    found = []
    torch.jit.trace(lambda x: [found.append(torch_doors.is_watched()), x + 1][1], torch.ones(2), check_trace=False)
    assert found == [True] and not torch_doors.is_watched()


def test_below_autograd_nothing_is_recorded():
    x = torch.ones(2, requires_grad=True)
    with torch_doors.below_autograd():
        assert torch.is_grad_enabled() and not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_a_tensor_counts_its_changes():
    x = torch.ones(2)
    first = torch_doors.version(x)
    x.add_(1)
    assert torch_doors.version(x) == first + 1
    with torch.inference_mode():
        assert torch_doors.version(torch.ones(2)) == 0


@no_gpu
def test_the_stream_of_a_gpu_is_the_current_one():
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        inside = torch_doors.cuda_stream(0)
        assert inside == torch.cuda.current_stream(0).cuda_stream
    assert torch_doors.cuda_stream(0) == torch.cuda.current_stream(0).cuda_stream != inside


def test_a_modules_own_parameters_are_the_ones_it_computes_with():
    module = nn.Linear(2, 2, bias=False)
    held = torch_doors.own_parameters(module)
    assert held == {"weight": module.weight, "bias": None}
    module.weight = nn.Parameter(torch.zeros(2, 2))
    assert held["weight"] is module.weight and torch_doors.own_parameters(module) is held


def test_a_modules_state_has_parameters_buffers_and_plain_tensors():
    module = nn.BatchNorm1d(2)
    module.plain = torch.ones(1)
    state = torch_doors.module_state(module)
    assert state.parameters["weight"] is module.weight and state.buffers["running_mean"] is module.running_mean
    assert state.own["plain"] is module.plain and not state.hooked and not state.children
    handle = module.register_forward_pre_hook(lambda *args: None)
    assert torch_doors.module_state(module).hooked
    handle.remove()
    assert torch_doors.module_state(nn.Sequential(module)).children == {"0": module}


def test_hooks_of_a_module_and_of_all_modules():
    module = nn.Linear(2, 2)
    assert torch_doors.module_hooks(module) == [] and not torch_doors.has_global_hooks()
    handles = [module.register_forward_hook(forbidden), module.register_forward_pre_hook(print)]
    assert torch_doors.module_hooks(module) == [forbidden, print]
    handles.append(nn.modules.module.register_module_forward_hook(forbidden))
    assert torch_doors.has_global_hooks()
    for handle in handles:
        handle.remove()
    assert torch_doors.module_hooks(module) == [] and not torch_doors.has_global_hooks()


def test_convolutions_of_all_dimensions():
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert all(torch_doors.is_convolution(one(2, 2, 1)) for one in classes)
    assert not torch_doors.is_convolution(nn.Linear(2, 2))


def test_both_ways_of_compiling_are_seen():
    model = nn.Linear(2, 2)
    assert torch_doors.compiled_model(model) is None and not torch_doors.has_own_call(model)
    assert torch_doors.compiled_model(torch.compile(model, backend="eager")) is model
    assert not torch_doors.has_own_call(model)
    model.compile(backend="eager")
    assert torch_doors.has_own_call(model) and torch_doors.compiled_model(model) is None


# -- accelerate ---------------------------------------------------------------------------------------------------------------


def test_an_offloaded_embedding_computes_elsewhere_than_it_is_kept(family_dir, tmp_path):
    plain = load(family_dir("llama"))
    embeddings = plain.get_input_embeddings()
    assert not accelerate_doors.has_placement(embeddings) and accelerate_doors.execution_device(embeddings) is None
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load(family_dir("llama"), device_map={"model.embed_tokens": "disk", **places}, offload_folder=tmp_path)
    embeddings = model.get_input_embeddings()
    assert accelerate_doors.has_placement(embeddings) and embeddings.weight.is_meta
    assert accelerate_doors.execution_device(embeddings) == torch.device("cpu")


def test_what_is_offloaded_beside_its_neighbour_is_what_the_layer_computes_with(family_dir, tmp_path):
    model, changed = load(family_dir("llama_bias")), load(family_dir("llama_bias"))
    name = "model.layers.0.mlp.up_proj"
    weight = changed.get_parameter(f"{name}.weight")
    weight.data = weight.data.flip(0)
    # As transformers offloads a layer: its tensors in a file, and an index of where each is.
    file, state = tmp_path / "some.safetensors", model.get_submodule(name).state_dict()
    save_file({f"{name}.{part}": value for part, value in state.items()}, file)
    index = {f"{name}.{part}": {"safetensors_file": str(file), "weight_name": f"{name}.{part}"} for part in state}
    weights = accelerate.utils.OffloadedWeightsLoader(save_folder=tmp_path, index=index)
    options = {"execution_device": torch.device("cpu"), "offload": True, "weights_map": weights}
    accelerate.hooks.attach_align_device_hook(model.get_submodule(name), module_name=name, **options)
    accelerate_doors.offload_beside(model.get_submodule(name), f"{name}.weight", weight.data, f"{name}.bias")
    torch.testing.assert_close(logits(model), logits(changed))


# -- DeepSpeed ----------------------------------------------------------------------------------------------------------------

ZERO3 = """
import os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0", DS_ACCELERATOR="cpu")
import deepspeed, torch
from torch import nn
from hf_littlebit.internals.deepspeed import is_partitioned, local_part, stepped_groups
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.manual_seed(0)
module = nn.Linear(5, 3)
whole = {name: value.detach().clone() for name, value in module.named_parameters()}
assert not any(map(is_partitioned, module.parameters()))
optimizer = torch.optim.AdamW([{"params": [module.weight], "weight_decay": 0.5}, {"params": [module.bias], "weight_decay": 0.25}])
assert stepped_groups(optimizer) is None
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
          "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
engine, optimizer, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
for name, value in module.named_parameters():
    assert is_partitioned(value) and not value.numel()
    part, first = local_part(value)
    assert first == 0 and torch.equal(part, whole[name].flatten()), name
found = {id(value): options["weight_decay"] for values, options in stepped_groups(optimizer) for value in values}
assert found == {id(module.weight): 0.5, id(module.bias): 0.25}, found
print("all doors are open")
"""


def test_parameters_and_groups_that_deepspeed_took_apart():
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'hf-littlebit[deepspeed]'")
    done = subprocess.run([sys.executable, "-c", ZERO3], capture_output=True, text=True, timeout=200)
    assert "all doors are open" in done.stdout, done.stderr[-4000:]


def test_a_function_of_one_level_is_applied_at_each_level():
    """In the kernel of an operator, which the dispatcher asks once for each transform; a usual Function may not be there."""

    class Square(torch_doors.OneLevelFunction):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            with torch_doors.recording(torch_doors.in_function_transform()):
                levels.append((torch.is_grad_enabled(), torch_doors.in_function_transform()))
                return torch.ops.littlebit_doors.square(x)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent * ctx.saved_tensors[0]

    def kernel(x):
        with torch_doors.one_level():
            return Square.apply(x)

    levels: list[tuple[bool, bool]] = []
    with torch.library._scoped_library("littlebit_doors", "FRAGMENT") as library:
        library.define("square(Tensor x) -> Tensor")
        library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")
        library.impl("square", kernel, "Autograd")
        square = torch.ops.littlebit_doors.square
        x = torch.tensor(3.0)
        assert torch.func.grad(square)(x) == 6
        assert levels[0] == (True, True)  # the level below may record
        assert torch.func.jvp(torch.func.grad(square), (x,), (torch.tensor(1.0),))[1] == 2
        levels.clear()
        square(x.clone().requires_grad_()).backward()
        assert levels == [(False, False)]


def test_forward_mode_is_seen_whether_gradients_are_on_or_not():
    assert not torch_doors.in_forward_mode()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        assert torch_doors.in_forward_mode() and torch_doors.is_watched()
    assert not torch_doors.in_forward_mode()


def test_without_overrides_a_subclass_is_a_plain_tensor():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    loud = torch.ones(2).as_subclass(Loud)
    with pytest.raises(AssertionError):
        loud + 1
    with torch_doors.without_overrides():
        assert (loud + 1).tolist() == [2, 2] and loud.dtype == torch.float32


def test_weights_are_untied_for_good_and_tied_again():
    model = build("llama_tied")
    assert doors.tied_weights(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    doors.untie(model, ["lm_head.weight"])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights()
    assert doors.tied_weights(model) == {} and model.lm_head.weight is not model.model.embed_tokens.weight
    assert type(model)._tied_weights_keys  # of the one model alone
    doors.tie_again(model)
    assert doors.tied_weights(model) and model.lm_head.weight is model.model.embed_tokens.weight
