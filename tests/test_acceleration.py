import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

import diffusers
import transformers

from ldm4ts_kernels import accelerate_attention
from ldm4ts_kernels.plugged_layer import Policy
from tests import families
from tests.families import FAMILIES, assert_same, build, run

BY_NAME = {family.name: family for family in FAMILIES}
UNET, FLUX, CLIP = (
    BY_NAME[name] for name in ("UNet2DConditionModel", "FluxTransformer2DModel", "CLIPTextModel")
)


def state(model):
    """Return all that plugging may touch: processors, their attributes, hooks, configurations."""
    processors = [getattr(module, "processor", None) for module in model.modules()]
    return (
        [(id(item), dict(getattr(item, "__dict__", {}))) for item in processors],
        [(len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()],
        [getattr(getattr(m, "config", None), "_attn_implementation", 0) for m in model.modules()],
    )


def pipeline():
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=10, clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=families.autoencoder(),
        text_encoder=families.clip(),
        tokenizer=None,
        unet=families.unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    embeds = pipe.text_encoder(torch.arange(7)[None]).last_hidden_state
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        num_inference_steps=2,
        output_type="latent",
        latents=families.random(1, 4, 8, 8),
    ).images


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_removing_restores_exactly_what_was_there(family):
    model = build(family)
    before = state(model)
    handle = accelerate_attention(model)
    assert state(model) != before
    handle.remove()
    assert state(model) == before
    handle.remove()


def test_leaving_the_context_restores_and_the_report_stays():
    model = build(FLUX)
    before = state(model)
    with pytest.raises(ZeroDivisionError), accelerate_attention(model) as handle:
        run(FLUX, model)
        raise ZeroDivisionError
    assert state(model) == before
    assert [row.served_by for row in handle.report()] == ["sdpa", "sdpa"]


def test_nested_handles_come_off_in_turn():
    for family in (UNET, FLUX, CLIP):
        model = build(family)
        before = state(model)
        with accelerate_attention(model) as outer:
            with accelerate_attention(model, precision="int8") as inner:
                inner.verify()
            run(family, model)
            outer.verify()
        assert state(model) == before
        assert {row.served_by for row in outer.report()} == {"sdpa"}
        assert {row.served_by for row in inner.report()} == {None}


def test_another_model_of_the_family_is_not_touched():
    for family in (UNET, FLUX, CLIP):
        model, other = build(family), build(family)
        before = state(other)
        with accelerate_attention(model, backend="triton") as handle:
            assert state(other) == before
            run(family, other)
            assert {layer.shape for layer in handle.layers} == {None}


def test_the_report_says_who_served_each_layer_and_why_nobody_before():
    model = build(UNET)
    with accelerate_attention(model) as handle:
        run(UNET, model)
    row = handle.report()[0]
    assert row.layer == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert (row.policy, row.shape, row.served_by) == (Policy(), (2, 2, 64, 64, 8), "sdpa")
    assert list(row.reasons) == ["native", "flash_attn", "triton", "flash_attn4"]
    lines = str(handle.report()).splitlines()
    assert lines[1].endswith("sdpa       [1]") and lines[2].endswith("sdpa       [2]")
    notes = [line for line in lines[UNET.layers + 1 :] if line.startswith("[")]
    assert [note[:11] for note in notes] == ["[1] native:", "[2] native:"]


def test_shapes_are_reported_without_computing_anything():
    model = build(UNET).to("meta")
    with accelerate_attention(model) as handle:
        model(torch.empty(2, 4, 8, 8, device="meta"), 3, torch.empty(2, 5, 16, device="meta"))
    assert [row.shape for row in handle.report()] == [(2, 2, 64, k, 8) for k in (64, 5)] * 4
    assert {row.served_by for row in handle.report()} == {"sdpa"}


@pytest.mark.parametrize(
    ("precision", "layer", "backend", "reason"),
    [
        ("exact", "attn1", "native", "needs a cuda device, got cpu"),
        ("exact", "attn1", "flash_attn", "flash_attn does not import: broken on purpose"),
        ("exact", "attn1", "native", "takes bfloat16, float16, got float32"),
        ("int8", "attn1", "sageattention", "has no backward pass"),
        ("int8", "attn2", "sageattention2", "takes no additive mask"),
        ("int8", "attn1", "sageattention", "takes head dims [64, 96, 128], got 8"),
    ],
)
@pytest.mark.filterwarnings("ignore:precision='int8'")
def test_each_link_that_does_not_serve_says_why(monkeypatch, precision, layer, backend, reason):
    monkeypatch.setattr(
        "ldm4ts_kernels.requirements.import_error",
        lambda module: f"{module} does not import: broken on purpose",
    )
    model = build(UNET)
    with accelerate_attention(model, precision=precision) as handle:
        run(UNET, model)
    row = next(row for row in handle.report() if row.layer.endswith(layer))
    assert row.served_by == "sdpa"
    assert reason in row.reasons[backend]
    assert reason in str(handle.report())


def test_a_pipeline_is_plugged_with_all_its_models():
    torch.manual_seed(0)
    pipe = pipeline()
    expected = generate(pipe)
    with accelerate_attention(pipe) as handle:
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    served = {row.layer: row.served_by for row in handle.report()}
    assert {name.split(".")[0] for name in served} == {"vae", "text_encoder", "unet"}
    assert {who for name, who in served.items() if not name.startswith("vae")} == {"sdpa"}


def test_a_policy_goes_by_prefix_and_glob_and_the_first_match_counts():
    model = build(UNET)
    layers = {"mid_block": None, "*.attn2": "exact", "up_blocks": "int8"}
    with accelerate_attention(model, layers=layers) as handle:
        found = {layer.name: layer.policy.precision for layer in handle.layers}
    assert [item.name.split(".")[0] for item in handle.unplugged] == ["mid_block"] * 2
    assert "left alone" in handle.unplugged[0].reason
    for name, precision in found.items():
        int8 = name.startswith("up_blocks") and not name.endswith("attn2")
        assert precision == ("int8" if int8 else "exact")


def test_a_policy_may_be_a_function():
    model = build(FLUX)
    choose = {"transformer_blocks.0.attn": "int8", "single_transformer_blocks.0.attn": "exact"}
    with accelerate_attention(model, layers=lambda name, module: choose[name]) as handle:
        assert {layer.name: layer.policy.precision for layer in handle.layers} == choose


def test_layers_that_share_a_processor_still_have_policies_of_their_own():
    model = build(FLUX)
    model.set_attn_processor(next(iter(model.attn_processors.values())))
    before = state(model)
    with accelerate_attention(model, layers={"transformer_blocks": None}) as handle:
        run(FLUX, model)
    assert [layer.shape for layer in handle.layers] == [(2, 2, 22, 22, 16)]
    assert state(model) == before


@pytest.mark.parametrize(
    ("displace", "found"),
    [
        (lambda model: model.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
        (lambda model: model.set_attention_slice(1), "SlicedAttnProcessor"),
    ],
)
def test_verify_finds_what_a_later_call_displaced_and_removing_leaves_it(displace, found):
    model = build(UNET)
    handle = accelerate_attention(model)
    handle.verify()
    displace(model)
    with pytest.raises(RuntimeError, match=f"attn1 now has {found}"):
        handle.verify()
    with pytest.warns(UserWarning, match=rf"attn1 .{found}"):
        handle.remove()
    assert {type(processor).__name__ for processor in model.attn_processors.values()} == {found}


def load_ip_adapter(model):
    """Load a small IP-Adapter with random weights, as `pipe.load_ip_adapter` does."""
    cross = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    weights = {
        f"{1 + 2 * index}.to_{kind}_ip.weight": families.random(16, 16)
        for index in range(len(cross))
        for kind in "kv"
    }
    image = {"proj.weight": families.random(64, 32), "proj.bias": torch.zeros(64)}
    image |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}])


def test_verify_finds_an_ip_adapter_and_the_model_runs_with_it():
    plain, model = build(UNET), build(UNET)
    handle = accelerate_attention(model)
    for each in (plain, model):
        load_ip_adapter(each)
    with pytest.raises(RuntimeError, match="attn2 now has IPAdapterAttnProcessor2_0"):
        handle.verify()
    image = {"image_embeds": [families.random(2, 1, 32)]}
    sample, context = families.random(2, 4, 8, 8), families.random(2, 5, 16)
    ours, theirs = (each(sample, 3, context, added_cond_kwargs=image) for each in (model, plain))
    torch.testing.assert_close(ours.sample, theirs.sample)
    with pytest.warns(UserWarning, match="keep what displaced the plugged ones"):
        handle.remove()


def test_an_autoencoders_one_head_of_512_is_served_and_the_report_says_by_whom():
    model = diffusers.AutoencoderKL(
        block_out_channels=(512,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
    )
    image = families.random(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(image).sample
        with accelerate_attention(model) as handle:
            torch.testing.assert_close(model(image).sample, expected)
    for row in handle.report():
        assert (row.shape, row.served_by) == ((1, 1, 64, 64, 512), "sdpa")
        assert "takes head dims up to 256, got 512" in row.reasons["flash_attn"]


def test_verify_finds_a_dispatcher_or_encoder_that_was_switched():
    flux, clip = build(FLUX), build(CLIP)
    handles = accelerate_attention(flux), accelerate_attention(clip)
    flux.transformer_blocks[0].attn.set_attention_backend("native")
    clip.set_attn_implementation("eager")
    for handle, found in zip(handles, ("attention backend", "implementation 'eager'"), strict=True):
        with pytest.raises(RuntimeError, match=found):
            handle.verify()


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"Linear has none .* sdpa_override\.activate\(\) serves"):
        accelerate_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be a torch module or a diffusers pipeline, got str"):
        accelerate_attention("a model")


def test_layers_of_unknown_kinds_are_named_with_the_reason():
    model = build(UNET)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="FusedAttnProcessor2_0 computes more than, or other than"):
        accelerate_attention(model)
    both = torch.nn.ModuleList([build(FLUX), torch.nn.MultiheadAttention(4, 1)])
    handle = accelerate_attention(both)
    assert "MultiheadAttention calls torch's attention by itself" in str(handle.report())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, r"precision must be one of \['exact', 'int8'\], got 'fp8'"),
        ({"backend": "xformers"}, "backend must be one of .*, got 'xformers'"),
        ({"layers": {"middle": "exact"}}, "layers: 'middle' matches none of"),
        ({"layers": {"*": "fp8"}}, "precision must be one of"),
        ({"layers": {"*": None}}, "left alone as layers= says"),
        ({"layers": "int8"}, "layers must be a mapping or a function, got str"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_changes(arguments, message):
    model = build(UNET)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        accelerate_attention(model, **arguments)
    assert state(model) == before


def test_an_encoder_is_plugged_whole():
    with pytest.raises(ValueError, match="transformers switches whole models"):
        accelerate_attention(build(CLIP), layers={"encoder.layers.0": None})


def test_a_plug_that_fails_takes_the_others_off_again(monkeypatch):
    flux = build(FLUX)
    models = torch.nn.ModuleList([build(UNET), flux])
    before = state(models)
    monkeypatch.setattr("ldm4ts_kernels.dispatcher._member", lambda policy: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accelerate_attention(models)
    assert state(models) == before


def test_a_diffusers_that_moved_its_dispatcher_is_an_error_that_says_so(monkeypatch):
    from diffusers.models import attention_dispatch

    from ldm4ts_kernels import dispatcher

    monkeypatch.delattr(attention_dispatch, "_AttentionBackendRegistry")
    with pytest.raises(RuntimeError, match="keeps its attention dispatcher elsewhere"):
        dispatcher._member.__wrapped__(Policy())


def test_a_copy_of_a_plugged_model_runs_by_itself():
    for family in (UNET, FLUX, CLIP):
        model = build(family)
        expected = run(family, model)
        with accelerate_attention(model) as handle:
            fresh = copy.deepcopy(model)
            assert_same(run(family, fresh), expected)
            assert {layer.shape for layer in handle.layers} == {None}
            used = copy.deepcopy(fresh)
            assert_same(run(family, used), expected)


def test_what_an_encoder_asks_beyond_attention_is_refused():
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    accelerate_attention(model)
    layer = next(m for m in model.modules() if type(m).__name__ == "CLIPAttention")
    states = families.random(1, 3, 16)
    with pytest.raises(NotImplementedError, match="softcap"):
        layer(states, None, softcap=30.0)


def test_a_plugged_diffusers_model_can_be_pickled_whole_and_runs_in_another_process(tmp_path):
    for family in (UNET, FLUX):
        model = build(family)
        accelerate_attention(model)
        expected = run(family, model)[0]
        torch.save((model, expected), tmp_path / f"{family.name}.pt")
    code = f"""
import sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.families import FAMILIES
for family in FAMILIES:
    if (file := Path({str(tmp_path)!r}, f"{{family.name}}.pt")).exists():
        model, expected = torch.load(file, weights_only=False)
        torch.testing.assert_close(family.call(model), expected)
        print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.stdout.split() == ["ran"] * 2, done.stderr
