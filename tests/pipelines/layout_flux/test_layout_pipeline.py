"""The pipeline on a tiny FLUX from disk: plain FLUX where nothing is asked for, boxes, references, windows, guidance,
round trips, offloading, and what is said to wrong arguments."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import accelerate
import pytest
import torch
from diffusers import FluxPipeline
from flux_checkpoint import CLIP, DINO, SIDE, create_adapter, write_flux
from PIL import Image
from torch import Tensor

from backlot.codecs import PixelCodec
from pipelines.layout_flux import FluxLayoutPipeline, Layout, LayoutFlux
from pipelines.layout_flux.files import save_adapter
from pipelines.layout_flux.inputs import Instance, collect_instances, depth_label, find_phrases
from pipelines.layout_flux.pipeline import window

PROMPT = "a red disc and a blue square"
BOXES = [[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 1.0, 1.0]]
BOX_PROMPTS = ["a red disc", "square, a blue square"]
LAYOUT = {"boxes": BOXES, "box_prompts": BOX_PROMPTS}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def untrained(flux, tmp_path_factory):
    return write_adapter(flux, tmp_path_factory.mktemp("untrained"), awake=False)


@pytest.fixture(scope="module")
def trained(flux, tmp_path_factory):
    return write_adapter(flux, tmp_path_factory.mktemp("trained"))


def write_adapter(flux, folder, **settings):
    encoders = {"clip": str(flux / "clip_vision"), "dino": str(flux / "dino")}
    save_adapter(create_adapter(load(flux).transformer, encoders=encoders, **settings), folder)
    return folder


def load(folder, adapter=None, kind=FluxLayoutPipeline, **settings):
    pipeline = kind.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_layout_adapter(adapter)
    return pipeline


@pytest.fixture(scope="module")
def shared(flux, trained):
    """With a trained adapter and reference encoders. What changes it loads its own."""
    pipeline = load(flux, trained)
    pipeline.load_reference_encoders()
    return pipeline


@pytest.fixture(scope="module")
def plain(flux):
    return load(flux, kind=FluxPipeline)


def draw(pipeline, prompt=PROMPT, seed=0, **arguments) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1]."""
    batch = len(prompt) if isinstance(prompt, list) else 1
    batch *= arguments.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "output_type": "pt", "max_sequence_length": 12}
    return pipeline(**{"prompt": prompt, **settings, **arguments}, generator=generators).images


def differ(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def reference(colour: str) -> Image.Image:
    picture = Image.new("RGB", (20, 14), "grey")
    picture.paste(colour, (4, 3, 15, 11))
    return picture


# --- plain FLUX ---------------------------------------------------------------------------------------------------


def test_an_untrained_adapter_changes_not_one_bit(flux, plain, untrained):
    pipeline = load(flux, untrained)
    pipeline.load_reference_encoders()
    layout = {**LAYOUT, "reference_images": [reference("red"), None], "grounding_ratio": 1.0}
    assert torch.equal(draw(pipeline, **layout), draw(plain))
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "a ring"}
    assert torch.equal(draw(pipeline, **layout, **guided), draw(plain, **guided))
    assert torch.equal(draw(pipeline), draw(plain))


def test_without_boxes_or_strength_it_is_flux(shared, plain):
    expected = draw(plain)
    for arguments in ({}, {"boxes": []}, {"boxes": [[]]}, {**LAYOUT, "layout_scale": 0.0, "identity_scale": 0.0}):
        assert torch.equal(draw(shared, **arguments), expected), arguments
    assert differ(draw(shared, **LAYOUT), expected) > 0.02


def test_every_argument_of_flux_is_one_of_ours():
    theirs, ours = (inspect.signature(kind.__call__).parameters for kind in (FluxPipeline, FluxLayoutPipeline))
    assert list(ours)[: len(theirs)][-1] == "max_sequence_length"
    for name, parameter in theirs.items():
        default = ours[name].default
        assert (list(default) if name == "callback_on_step_end_tensor_inputs" else default) == parameter.default, name


def test_every_argument_of_flux_arrives(shared, plain, untrained, flux):
    pipeline = load(flux, untrained)
    with torch.no_grad():
        embeds, pooled, _ = plain.encode_prompt("a ring", "a green ring", max_sequence_length=12)
    changes = [
        {"prompt_2": "a green ring"},
        {"num_inference_steps": 2},
        {"sigmas": [1.0, 0.8, 0.1]},
        {"guidance_scale": 1.0},
        {"latents": torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(3))},
        {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
        {"true_cfg_scale": 3.0, "negative_prompt": "a ring", "negative_prompt_2": "a ring on grey"},
        {"true_cfg_scale": 3.0, "negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled},
        {"max_sequence_length": 4},
        {"width": 2 * SIDE},
        {"callback_on_step_end": lambda pipeline, i, t, tensors: {"latents": tensors["latents"] * 0.9}},
    ]
    usual = draw(plain)
    for change in changes:
        expected = draw(plain, **change)
        assert torch.equal(draw(pipeline, **change, boxes=BOXES), expected), change
        assert expected.shape != usual.shape or not torch.equal(expected, usual), change


def test_other_forms_of_output(shared):
    image = shared(PROMPT, **LAYOUT, height=SIDE, width=SIDE, num_inference_steps=1)
    assert isinstance(image.images[0], Image.Image)
    (alpha,) = image.alpha
    assert [0.05 < value < 0.95 for value in alpha] == [True, True]
    (latents,) = shared(
        PROMPT, **LAYOUT, height=SIDE, width=SIDE, num_inference_steps=1, output_type="latent", return_dict=False
    )
    assert latents.shape == (1, 64, 16)
    assert shared.joint_attention_kwargs is None


# --- the layout ---------------------------------------------------------------------------------------------------


def test_a_batch_is_its_pictures_one_by_one(shared):
    prompts = [PROMPT, "a green ring"]
    layouts = {
        "boxes": [BOXES, [[0.0, 0.0, 1.0, 0.3]]],
        "box_prompts": [BOX_PROMPTS, [None]],
        "reference_images": [[None, (reference("blue"), (0.1, 0.1, 0.9, 0.9))], [reference("green")]],
    }
    together = draw(shared, prompts, **layouts)
    for i, prompt in enumerate(prompts):
        alone = draw(shared, prompt, seed=i, **{name: value[i] for name, value in layouts.items()})
        assert differ(together[i : i + 1], alone) < 1e-5
        listed = draw(shared, [prompt], seed=i, **{name: [value[i]] for name, value in layouts.items()})
        assert torch.equal(listed, alone)


def test_several_pictures_of_each_prompt(shared):
    prompts, boxes = [PROMPT, "a green ring"], [BOXES, [[0.0, 0.0, 1.0, 0.3]]]
    many = draw(shared, prompts, boxes=boxes, num_images_per_prompt=2)
    for i in range(4):
        alone = draw(shared, prompts[i // 2], seed=i, boxes=boxes[i // 2])
        assert differ(many[i : i + 1], alone) < 1e-5


def test_every_part_of_a_description_matters(shared):
    usual = {**LAYOUT, "reference_images": [reference("red"), reference("blue")], "grounding_ratio": 1.0}
    changes = [
        {"boxes": [BOXES[0], [0.0, 0.5, 0.5, 1.0]]},
        {"box_prompts": ["a green ring", BOX_PROMPTS[1]]},
        {"box_prompts": [None, BOX_PROMPTS[1]]},
        {"reference_images": [reference("green"), reference("blue")]},
        {"reference_images": [(reference("red"), (0.5, 0.5, 1.0, 1.0)), reference("blue")]},
        {"reference_images": None},
        {"foreground": [True, False]},
        {"foreground": [0.9, 0.2]},
        {"phrase_spans": [(0, 4), None]},
        {"layout_scale": 0.5},
        {"identity_scale": 0.5},
        {"grounding_ratio": 0.3},
        {"modulation_ratio": 0.0},
        {"feedback": False},
        {"layout_guidance_scale": 2.0},
        {"true_cfg_scale": 2.0, "negative_prompt": "a ring"},
    ]
    expected = draw(shared, **usual)
    for change in changes:
        assert differ(draw(shared, **{**usual, **change}), expected) > 1e-4, change
    assert torch.equal(draw(shared, **usual), expected)
    given = shared(PROMPT, **usual, foreground=[True, 0.1], height=SIDE, width=SIDE, num_inference_steps=1).alpha
    assert given == [pytest.approx([0.75, 0.1])]


def test_precomputed_embeddings_say_the_same(shared):
    pictures = [reference("red"), None]
    expected = draw(shared, **LAYOUT, reference_images=pictures)
    instances = collect_instances(1, 4, **LAYOUT, reference_images=pictures)
    with torch.no_grad():
        layout = shared.encode_layout(instances, [PROMPT])
    embeds = {
        "text": layout.text_embeds[0],
        "clip": [layout.clip_embeds[0, 0], None],
        "dino": [layout.dino_embeds[0, 0], None],
    }
    spans = [(0, 10), (15, 28)]
    assert torch.equal(draw(shared, boxes=BOXES, instance_embeds=embeds, phrase_spans=spans), expected)
    assert torch.equal(draw(shared, layout=layout), expected)
    with torch.no_grad():
        embeddings = shared.encode_prompt(PROMPT, max_sequence_length=12)[:2]
    texts = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeddings, strict=True))
    tokens = layout.phrase_spans[0].tolist()
    assert tokens == [[0, 3], [4, 7]]
    described = {"boxes": BOXES, "instance_embeds": embeds, "phrase_spans": tokens}
    assert torch.equal(draw(shared, None, **texts, **described), expected)


def test_scales_that_stay_multiply_those_of_a_call(flux, trained):
    pipeline = load(flux, trained)
    expected = draw(pipeline, **LAYOUT, layout_scale=0.25, identity_scale=0.5)
    pipeline.set_layout_scale(0.5, 0.5)
    assert torch.equal(draw(pipeline, **LAYOUT, layout_scale=0.5), expected)
    pipeline.set_layout_scale()
    assert torch.equal(draw(pipeline, **LAYOUT, layout_scale=0.25, identity_scale=0.5), expected)


def test_phrases_are_found_word_for_word():
    def spans(prompt, *prompts):
        return find_phrases(prompt, [Instance((0, 0, 1, 1), prompt=each) for each in prompts])

    assert spans("A red disc, a blue square", "a blue square", "a red disc") == [(12, 25), (0, 10)]
    assert spans("a red disc", "disc, a red disc", "red", None) == [(0, 10), (2, 5), None]
    assert spans("a cat, a cat and a dog", "a cat", "a cat", "a cat") == [(0, 5), (7, 12), (7, 12)]
    assert spans("a category", "a cat", "a.*") == [None, None]
    assert find_phrases("a cat", [Instance((0, 0, 1, 1), "a cat", span=(2, 5))]) == [(2, 5)]


def test_depth_is_guessed_by_area_and_height():
    boxes = {(0, 0, 0.5, 0.5): "foreground", (0.4, 0.8, 0.45, 0.85): "foreground", (0, 0, 0.05, 0.05): "background"}
    boxes |= {(0.4, 0.1, 0.6, 0.3): "background", (0.4, 0.4, 0.6, 0.6): "midground"}
    assert {box: depth_label(box) for box in boxes} == boxes


# --- windows and guidance -----------------------------------------------------------------------------------------


def test_windows_round_up_and_are_never_empty():
    asked = {(0.3, 4): 2, (0.3, 28): 9, (0.0, 4): 1, (0.1, 4): 1, (1.0, 4): 4, (0.1, 30): 3, (0.3, 10): 3}
    assert {key: window(*key) for key in asked} == asked


def record(pipeline, **arguments) -> list[tuple[bool, bool]]:
    """For each step whether boxes act and whether identities do, as the transformer is given it."""
    seen = []

    def note(module, args, kwargs):
        state = kwargs["joint_attention_kwargs"]["layout"]
        seen.append((state.use_layout, state.use_modulation))

    handle = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    draw(pipeline, **LAYOUT, num_inference_steps=4, **arguments)
    handle.remove()
    return seen


def test_windows_switch_step_by_step(shared):
    on, off = True, False
    assert record(shared) == [(on, on), (on, on), (off, on), (off, on)]
    assert record(shared, grounding_ratio=0.0, modulation_ratio=0.5) == [(on, on), (off, on), (off, off), (off, off)]
    assert record(shared, grounding_ratio=1.0, modulation_ratio=0.0) == [(on, off)] * 4
    assert record(shared, layout_scale=0.0) == [(off, on)] * 4
    assert record(shared, sigmas=[1.0, 0.5], grounding_ratio=0.5) == [(on, on), (off, on)]
    calls = []
    record(shared, callback_on_step_end=lambda pipeline, i, t, tensors: calls.append((i, *tensors)) or {})
    assert calls == [(i, "latents") for i in range(4)]


def test_a_closed_window_is_flux_from_there_on(shared, plain):
    """The second step of two, from the same latents."""
    kept = {}

    def keep(pipeline, i, t, tensors):
        kept.setdefault(i, tensors["latents"])
        return {}

    settings = {"num_inference_steps": 2, "output_type": "latent"}
    end = draw(shared, **LAYOUT, **settings, modulation_ratio=0.5, grounding_ratio=0.5, callback_on_step_end=keep)
    swap = {"callback_on_step_end": lambda pipeline, i, t, tensors: {"latents": kept[0]} if i == 0 else {}}
    assert torch.equal(end, draw(plain, **settings, **swap))
    still = draw(shared, **LAYOUT, **settings, grounding_ratio=0.5, **swap)
    assert differ(still, end) > 1e-4


def test_layout_guidance_goes_beyond_the_difference(shared, plain):
    settings = {"num_inference_steps": 1, "output_type": "latent", "latents": torch.randn(1, 64, 16)}
    without, once = draw(plain, **settings), draw(shared, **LAYOUT, **settings)
    for scale in (0.0, 1.5, 3.0):
        guided = draw(shared, **LAYOUT, **settings, layout_guidance_scale=scale)
        assert differ(guided, without + scale * (once - without)) < 1e-5


def test_true_cfg_keeps_boxes_in_both_passes_and_phrases_in_one(shared):
    seen = []

    def note(module, args, kwargs):
        state = kwargs["joint_attention_kwargs"]["layout"]
        seen.append((state.use_layout, bool(state.phrase_spans.any()), state.tokens))

    handle = shared.transformer.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    negative = {"true_cfg_scale": 2.0, "negative_prompt": "a ring"}
    guided = draw(shared, **LAYOUT, **negative, num_inference_steps=1, output_type="latent")
    handle.remove()
    assert [row[:2] for row in seen] == [(True, True), (True, False)]
    assert seen[0][2] is seen[1][2]
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    start = shared.prepare_latents(1, 4, SIDE, SIDE, torch.float32, "cpu", torch.Generator().manual_seed(0))[0]
    yes = draw(shared, **LAYOUT, **settings) - start
    no = draw(shared, "a ring", **LAYOUT, **settings) - start  # whose phrases are not found
    assert differ(guided - start, no + 2.0 * (yes - no)) < 1e-5
    assert not shared.transformer._forward_pre_hooks


# --- saving and loading -------------------------------------------------------------------------------------------


def test_unloading_gives_flux_back(flux, plain, trained):
    pipeline = load(flux, trained)
    with_layout = draw(pipeline, **LAYOUT)
    pipeline.unload_layout_adapter()
    pipeline.unload_layout_adapter()
    assert all("forward" not in vars(module) for module in pipeline.transformer.modules())
    assert torch.equal(draw(pipeline), draw(plain))
    assert "layout_adapter" not in pipeline.to_json_string() or pipeline.layout_adapter is None
    with pytest.raises(ValueError, match="there is no layout adapter: call `load_layout_adapter` first"):
        draw(pipeline, **LAYOUT)
    pipeline.load_layout_adapter(trained)
    pipeline.load_layout_adapter(trained)  # in the place of the first
    assert torch.equal(draw(pipeline, **LAYOUT), with_layout)


def test_the_whole_pipeline_round_trips(shared, tmp_path):
    layout = {**LAYOUT, "reference_images": [reference("red"), None]}
    expected = draw(shared, **layout)
    shared.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(map(torch.equal, weights(again), weights(shared)))
    assert differ(draw(again, **layout), expected) < 1e-6  # kernels round otherwise where weights lie otherwise
    shared.save_layout_adapter(tmp_path / "alone")
    again.load_layout_adapter(tmp_path / "alone")
    assert torch.equal(draw(again, **layout), expected)
    expected = draw(again, **layout)
    again.load_layout_adapter(tmp_path)  # of an exported pipeline
    assert torch.equal(draw(again, **layout), expected)


def weights(pipeline) -> list[Tensor]:
    networks = (pipeline.transformer, pipeline.layout_adapter, pipeline.vae, pipeline.clip_vision, pipeline.dino)
    return [tensor for network in networks for tensor in network.state_dict().values()]


def test_a_pipeline_without_text_encoders_and_with_a_pixel_codec(flux, shared, tmp_path):
    parts = {name: shared.components[name] for name in ("scheduler", "transformer", "layout_adapter")}
    pipeline = FluxLayoutPipeline(**parts, vae=PixelCodec(in_channels=1, block_size=2))
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embeds, pooled, _ = shared.encode_prompt(PROMPT)
    arguments = {"boxes": BOXES, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "output_type": "np"}
    pixels = torch.from_numpy(draw(pipeline, None, **arguments))
    assert pixels.shape == (1, SIDE, SIDE, 1)
    latents = draw(pipeline, None, **{**arguments, "output_type": "latent"})
    expected = pipeline.vae.decode(pipeline._unpack_latents(latents, SIDE, SIDE, 2)).sample
    assert torch.equal(pixels.permute(0, 3, 1, 2), (expected / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="`box_prompts` need the `text_encoder`"):
        draw(pipeline, None, **arguments, box_prompts=BOX_PROMPTS)
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.text_encoder is None
    assert differ(torch.from_numpy(draw(again, None, **arguments)), pixels) < 1e-6


def test_a_network_of_training_becomes_a_pipeline(flux, shared, trained):
    parts = load(flux).components
    adapter = create_adapter(parts["transformer"])
    network = LayoutFlux(parts["transformer"], adapter)
    pipeline = FluxLayoutPipeline(**{**parts, "layout_adapter": network.adapter})
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipeline, **LAYOUT), draw(shared, **LAYOUT))
    pipeline.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"`transformer` has a forward that is not its own: .* hooks of an offload"):
        FluxLayoutPipeline(**pipeline.components)


def test_an_adapter_of_another_transformer_is_refused(flux, trained, tmp_path):
    pipeline = load(flux, trained)
    other = write_flux(tmp_path, num_layers=2)
    foreign = write_adapter(other, tmp_path / "adapter")
    expected = draw(pipeline, **LAYOUT)
    with pytest.raises(ValueError, match="transformer with `num_layers` 2, not 3"):
        pipeline.load_layout_adapter(foreign)
    assert torch.equal(draw(pipeline, **LAYOUT), expected)


def test_flux_becomes_ours_without_loading_again(plain, trained, shared):
    pipeline = FluxLayoutPipeline.from_pipe(plain)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer is plain.transformer
    before = draw(plain)
    pipeline.load_layout_adapter(trained)
    assert torch.equal(draw(pipeline, **LAYOUT), draw(shared, **LAYOUT))
    assert torch.equal(draw(plain), before)  # although its transformer is listening
    pipeline.unload_layout_adapter()


# --- how it runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(shared):
    return draw(shared, **LAYOUT, reference_images=[reference("red"), None])


def draw_all(pipeline) -> Tensor:
    return draw(pipeline, **LAYOUT, reference_images=[reference("red"), None])


def offload(pipeline, way: str, device: str = "cpu") -> None:
    if way == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif way == "sequential" and device == "cpu":
        # diffusers would say cpu:0, whose tensors torch takes for others than cpu's
        pipeline._offload_device = torch.device("cpu")
        pipeline.enable_sequential_cpu_offload = lambda device: offload(pipeline, "sequential")
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name not in pipeline._exclude_from_cpu_offload:
                accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    elif way == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        blocks = 1 if way == "block_level" else None
        pipeline.enable_group_offload(torch.device(device), offload_type=way, num_blocks_per_group=blocks)


@pytest.mark.parametrize("way", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading_changes_nothing(flux, trained, plain, expected, way):
    pipeline = load(flux, trained)
    pipeline.load_reference_encoders()
    offload(pipeline, way)
    assert torch.equal(draw_all(pipeline), expected)
    pipeline.unload_layout_adapter()
    assert torch.equal(draw(pipeline), draw(plain))
    offloaded = [vars(module).keys() & {"_hf_hook", "_diffusers_hook"} for module in pipeline.transformer.modules()]
    assert any(offloaded)  # still
    pipeline.load_layout_adapter(trained)
    pipeline.load_layout_adapter(trained)
    assert torch.equal(draw_all(pipeline), expected)
    assert torch.equal(draw(pipeline), draw(plain))


@pytest.mark.parametrize("way", ["model", "sequential", "block_level", "leaf_level"])
def test_the_adapter_lies_where_the_others_compute(flux, trained, way, monkeypatch):
    pipeline = load(flux, trained)
    accelerator = SimpleNamespace(empty_cache=lambda: None, current_stream=lambda: None)
    monkeypatch.setattr(torch, "meta", accelerator, raising=False)  # a device that is not the CPU
    offload(pipeline, way, device="meta")
    assert {weight.device.type for weight in pipeline.layout_adapter.parameters()} == {"meta"}
    assert not {"_hf_hook", "_diffusers_hook"} & vars(pipeline.layout_adapter).keys()
    assert pipeline._execution_device.type == "meta"


def test_the_offload_that_was_on_is_on_again(flux, trained):
    for way, hook in (("model", "CpuOffload"), ("sequential", "AlignDevicesHook")):
        pipeline = load(flux)
        offload(pipeline, way)
        pipeline.load_layout_adapter(trained)
        hooks = {type(getattr(module, "_hf_hook", None)).__name__ for module in pipeline.transformer.modules()}
        assert hook in hooks or "SequentialHook" in hooks
        pipeline.load_reference_encoders()
        assert "_hf_hook" in vars(pipeline.dino)
        assert "_hf_hook" not in vars(pipeline.layout_adapter)


def test_other_precisions(flux, trained, expected):
    pipeline = load(flux, trained, dtype=torch.bfloat16)
    pipeline.load_reference_encoders()
    assert {part.dtype for part in (pipeline.layout_adapter, pipeline.dino)} == {torch.bfloat16}
    assert 0 < differ(draw_all(pipeline), expected) < 0.1


def test_layerwise_casting(flux, trained, untrained, expected, plain):
    pipeline = load(flux, trained)
    pipeline.load_reference_encoders()
    for network in (pipeline.transformer, pipeline.layout_adapter):
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stored = {weight.dtype for weight in pipeline.transformer.transformer_blocks.parameters()}
    assert torch.bfloat16 in stored
    assert 0 < differ(draw_all(pipeline), expected) < 0.1
    pipeline.load_layout_adapter(untrained)
    assert torch.equal(draw(pipeline, **LAYOUT), draw(pipeline))


def test_fused_projections(flux, trained, expected):
    pipeline = load(flux, trained)
    pipeline.load_reference_encoders()
    pipeline.transformer.fuse_qkv_projections()
    assert differ(draw_all(pipeline), expected) < 1e-5


def test_a_lora_of_the_user_beside_ours(flux, untrained, trained, tmp_path):
    peft = pytest.importorskip("peft")
    pipeline = load(flux, untrained)
    before = draw(pipeline)
    torch.manual_seed(5)
    settings = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_out.0", "proj_mlp"], init_lora_weights=False
    )
    source = load(flux)
    source.transformer.add_adapter(settings)
    weights = peft.get_peft_model_state_dict(source.transformer)
    FluxPipeline.save_lora_weights(tmp_path / "lora", weights)
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="style")
    alone = draw(pipeline)
    assert differ(alone, draw(source)) < 1e-6 < 1e-3 < differ(alone, before)
    assert torch.equal(draw(pipeline, **LAYOUT), alone)
    pipeline.set_adapters("style", 0.5)
    half = draw(pipeline, **LAYOUT)
    pipeline.set_adapters("style", 1.0)
    scaled = draw(pipeline, **LAYOUT, joint_attention_kwargs={"scale": 0.5})
    assert differ(scaled, half) < 1e-5 < differ(half, alone)
    with pytest.raises(ValueError, match="`transformer` carries a LoRA"):
        pipeline.save_pretrained(tmp_path / "whole")
    pipeline.save_layout_adapter(tmp_path / "adapter")
    pipeline.load_layout_adapter(trained)
    both = draw(pipeline, **LAYOUT)
    pipeline.unload_lora_weights()
    assert differ(both, draw(pipeline, **LAYOUT)) > 1e-3
    pipeline.save_pretrained(tmp_path / "whole")
    assert differ(draw(load(tmp_path / "whole"), **LAYOUT), draw(pipeline, **LAYOUT)) < 1e-6


def test_an_ip_adapter_beside_ours(flux, plain, untrained):
    images = [torch.randn(1, 1, CLIP, generator=torch.Generator().manual_seed(2))]
    drawn = []
    for adapter in (None, untrained):
        pipeline = load(flux, adapter)
        torch.manual_seed(7)
        state = ip_adapter_state(pipeline.transformer)
        pipeline.transformer._load_ip_adapter_weights([state])
        pipeline.set_ip_adapter_scale(1.0)
        layout = {} if adapter is None else LAYOUT
        embeds = {"ip_adapter_image_embeds": images, "negative_ip_adapter_image_embeds": images}
        drawn.append(draw(pipeline, **embeds, **layout))
    assert torch.equal(*drawn)
    assert differ(drawn[0], draw(plain)) > 1e-3


def ip_adapter_state(transformer) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-Adapter as it is published."""
    width, tokens = transformer.inner_dim, 4
    projection = {"proj.weight": torch.randn(tokens * width, CLIP), "proj.bias": torch.randn(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers = {}
    for i in range(len(transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            layers |= {f"{i}.{name}.weight": torch.randn(width, width), f"{i}.{name}.bias": torch.randn(width)}
    return {"image_proj": projection, "ip_adapter": layers}


# --- wrong arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": [[0.1, 0.1, 0.5, 1.2]]}, r"`boxes` must be x1 y1 x2 y2 with 0 <= x1 < x2 <= 1 .*got \(0.1, 0.1"),
        ({"boxes": [[0.5, 0.1, 0.1, 0.5]]}, "`boxes` must be x1 y1 x2 y2"),
        ({"boxes": [[0.5, 0.1, 0.6]]}, "`boxes` must be x1 y1 x2 y2"),
        ({"boxes": [[float("nan"), 0.1, 0.6, 0.5]]}, "`boxes` must be x1 y1 x2 y2"),
        ({"boxes": [BOXES, BOXES]}, "`boxes` must be a list for each of the 1 prompts, got 2"),
        ({"boxes": BOXES * 3}, "`boxes` must be at most 4 in a picture, got 6"),
        ({"boxes": BOXES, "box_prompts": ["a red disc"]}, r"`box_prompts` must have one entry per box, \[2\] .* \[1\]"),
        ({"boxes": BOXES, "box_prompts": ["a red disc", " "]}, "`box_prompts` must be texts or None, got ' '"),
        ({"boxes": BOXES, "reference_images": ["cup.png", None]}, "`reference_images` must be PIL images or None"),
        ({"boxes": BOXES, "foreground": [True, None]}, "`foreground` must be given for every box, or for none"),
        ({"boxes": BOXES, "foreground": [True, 2.0]}, r"`foreground` must be True, False or .* \[0, 1\], got 2.0"),
        ({"boxes": BOXES, "phrase_spans": [(3, 1), None]}, r"`phrase_spans` must be \(start, end\) .* got \(3, 1\)"),
        (
            {"boxes": BOXES, "instance_embeds": {"face": [1, 2]}},
            "`instance_embeds` must be by text, clip, dino, got face",
        ),
        ({"boxes": BOXES, "instance_embeds": {"dino": [torch.zeros(7), None]}}, rf"shape \({DINO},\), got \(7,\)"),
        ({"box_prompts": ["a red disc"]}, "`box_prompts` without `boxes`"),
        ({"boxes": BOXES, "height": 30}, "`height` and `width` must be multiples of 4, got 30 and 32"),
        ({"boxes": BOXES, "grounding_ratio": 1.5}, r"`grounding_ratio` must be in \[0, 1\], got 1.5"),
        ({"boxes": BOXES, "modulation_ratio": -0.1}, r"`modulation_ratio` must be in \[0, 1\], got -0.1"),
        ({"boxes": BOXES, "layout_guidance_scale": -1.0}, "`layout_guidance_scale` must be at least 0, got -1.0"),
        ({"boxes": BOXES, "prompt_embeds": torch.zeros(1, 3, 32)}, "Cannot forward both `prompt`"),
        ({"boxes": BOXES, "max_sequence_length": 600}, "`max_sequence_length` cannot be greater than 512"),
    ],
)
def test_wrong_arguments_are_named(shared, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(shared, **arguments)


def test_what_is_missing_is_named(flux, trained, shared):
    pipeline = load(flux)
    with pytest.raises(ValueError, match="there is no layout adapter"):
        draw(pipeline, **LAYOUT)
    with pytest.raises(ValueError, match="there is no layout adapter"):
        pipeline.save_layout_adapter("nowhere")
    pipeline.load_layout_adapter(trained)
    with pytest.raises(ValueError, match="`reference_images` need `clip_vision` and `dino`"):
        draw(pipeline, **LAYOUT, reference_images=[reference("red"), None])
    with torch.no_grad():
        layout = shared.encode_layout(collect_instances(1, 4, BOXES), [PROMPT])
    assert isinstance(layout, Layout)
    with pytest.raises(ValueError, match="`layout` says it all: leave out `boxes`"):
        draw(pipeline, layout=layout, boxes=BOXES)
