"""Recipes of the state-space families: true counts at full size on the meta device, and what their presets set."""

import pytest

from muonlm.config.recipes import RECIPES, load_recipe
from muonlm.errors import UserError
from muonlm.model import count_parameters

# As published or worked out by hand: tied, untied, without embeddings (the final norm counts with the blocks there).
PUBLISHED = {
    "muonssm/gdn-0.4b": (516_837_830, 565_989_830, 467_685_830),
    "muonssm/gdn-h1-0.4b": (530_764_908, 579_916_908, 481_612_908),
    "muonssm/gdn-1.3b": (1_309_295_488, 1_386_095_488, 1_232_495_488),
    "muonssm/gdn-h1-1.3b": (1_316_608_290, 1_390_336_290, 1_242_880_290),
    "muonssm/muonlonghorn-120m": (124_195_584, 148_771_584, 99_619_584),
    "muonssm/muonlonghorn-340m": (284_394_240, 308_970_240, 259_818_240),
    "muonssm/muonlonghorn-170m": (174_129_312, 195_633_312, 152_625_312),
    "muonssm/gdn-170m": (172_679_092, 194_183_092, 151_175_092),
    "muonssm/mamba-170m": (174_344_352, 195_848_352, 152_840_352),
    "muonssm/muonlonghorn-h1-0.4b": (231_098_112, 255_674_112, 206_522_112),
    "muonssm/muonlonghorn-1.3b": (1_334_172_000, 1_410_972_000, 1_257_372_000),
    "muonssm/muonlonghorn-h1-1.3b": (1_329_543_936, 1_403_271_936, 1_255_815_936),
    "muonssm/muonlonghorn-97m": (96_714_912, 118_218_912, 75_210_912),
    "mamba_slm/pretrain": (129_123_072, 167_725_824, 90_520_320),
}
NAMES = {
    "GatedDeltaNet_120M": 96_714_912,
    "GatedDeltaNet_170M": 96_714_912,
    "GatedDeltaNet_340M": 284_394_240,
    "GatedDeltaNet_0.4B": 174_129_312,
    "GatedDeltaNet_H1_0.4B": 231_098_112,
}
TRAINER = "mamba_trainer/hybrid-small"
# As infrabrew/mamba-recursive-model publishes them.
RATES = {  # optimizer, rate, steps, warm-up, evaluate every, save every
    "fast": ("adamw", 5e-4, 50_000, 1000, 500, 2500),
    "default": ("adamw", 3e-4, 100_000, 2000, 1000, 5000),
    "careful": ("adamw", 1e-4, 200_000, 5000, 2000, 10_000),
    "muon_fast": ("muon", 4e-3, 30_000, 500, 750, 2500),
    "muon_default": ("muon", 3e-3, 60_000, 1000, 1500, 5000),
    "muon_careful": ("muon", 2e-3, 120_000, 3000, 3000, 10_000),
    "muon_custom": ("muon", 2.5e-3, 80_000, 2000, 2000, 5000),
}


@pytest.mark.parametrize(("recipe", "expected"), PUBLISHED.items(), ids=PUBLISHED)
def test_parameter_counts_are_exact(recipe, expected):
    cfg = load_recipe(recipe).model
    counts = count_parameters(cfg)
    assert cfg.tie and counts["total"] == counts["tied"]
    assert (counts["tied"], counts["untied"], counts["tied"] - cfg.vocab_size * cfg.d_model) == expected


@pytest.mark.parametrize("recipe", ["longhorn-97m", "gated-deltanet-97m"])
def test_plain_forms_differ_from_the_muon_forms_in_the_mixer_only(recipe):
    plain, muon = load_recipe(f"muonssm/{recipe}"), load_recipe("muonssm/muonlonghorn-97m")
    assert plain.model.pattern != muon.model.pattern
    plain.model.pattern, plain.recipe = muon.model.pattern, muon.recipe
    assert plain == muon
    if recipe == "longhorn-97m":
        assert count_parameters(load_recipe(f"muonssm/{recipe}").model)["total"] == 96_714_912


@pytest.mark.parametrize(("name", "total"), NAMES.items(), ids=NAMES)
def test_published_names_are_recipes_with_their_true_counts(name, total):
    assert count_parameters(load_recipe(f"muonssm/published/{name}").model)["total"] == total


def test_the_configuration_without_a_name_is_attention_only():
    cfg = load_recipe("muonssm/published/lit-GPT").model
    found = (cfg.block_size, cfg.vocab_size, cfg.n_layer, cfg.n_head, cfg.d_model, cfg.layers)
    assert found == (4096, 50254, 16, 32, 4096, "A" * 16)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("muonssm/published", "muonssm/published/GatedDeltaNet_120M, "),  # where they were presets until 2026-11-26
        ("GatedDeltaNet_0.4B", "Did you mean 'muonssm/published/GatedDeltaNet_0.4B'"),
        ("GatedDeltaNet_430M", "Did you mean 'muonssm/published/GatedDeltaNet_340M'"),
    ],
)
def test_a_published_name_typed_otherwise_is_answered_with_its_recipe(typed, said):
    with pytest.raises(UserError, match=said):
        load_recipe(typed, preset="GatedDeltaNet_0.4B")


def families(*folders):
    return [str(p.relative_to(RECIPES).with_suffix("")) for f in folders for p in sorted((RECIPES / f).rglob("*.toml"))]


@pytest.mark.parametrize("recipe", families("muonssm", "mamba_slm", "mamba_trainer"))
def test_headers_say_name_place_and_source_and_their_counts_are_true(recipe):
    first, second = (RECIPES / f"{recipe}.toml").read_text("utf-8").splitlines()[:2]
    assert first.startswith(f"# {recipe} · ") and first.count(" · ") == 2 and second.startswith("# source: ")
    assert ".md" not in second.split("docs/")[0]  # words, or a page that is here
    flags = {"init_from": "none"} | ({"model.vocab_size": 4096} if "cpu" in recipe else {})
    counts = count_parameters(load_recipe(recipe, flags).model)
    if "parameters tied" in first:
        assert f"{counts['tied']:,} parameters tied" in first
    if "untied" in first:
        assert f"{counts['untied']:,} untied" in first
    assert "cpu" not in recipe or counts["total"] < 4e6


@pytest.mark.parametrize("recipe", families("mamba_trainer"))
def test_trainer_sizes_differ_in_the_model_only(recipe):
    if recipe.endswith(("-cpu", "gsm8k-finetune")):  # quickstart's; a stage
        return
    cfg, base = load_recipe(recipe), load_recipe("mamba_trainer/medium")
    cfg.model, cfg.recipe = base.model, base.recipe
    assert cfg == base


@pytest.mark.parametrize(("preset", "row"), RATES.items(), ids=RATES)
def test_trainer_presets_are_the_published_table_for_every_size(preset, row):
    cfg = load_recipe(TRAINER, preset=preset)
    schedule = (cfg.train.steps, cfg.sched.warmup, cfg.eval.every, cfg.train.save_every)
    assert (cfg.optim.name, cfg.optim.lr, *schedule) == row
    assert cfg.sched.kind == "linear" and cfg.sched.end_factor == 0 and cfg.optim.wd == 0.1 and cfg.optim.grad_clip == 1


def test_a_preset_and_an_optimizer_can_be_chosen_apart_and_no_rate_is_the_others():
    def rate(preset, name):
        return load_recipe(TRAINER, {"optim.name": name} if name else {}, preset=preset).optim.lr

    assert rate("", "") == rate("default", "muon") == rate("fast", "muon") == 3e-3
    assert rate("", "adamw") == rate("muon_fast", "adamw") == rate("default", "adamw") == 3e-4
    assert rate("careful", "adamw") == 1e-4 and rate("muon_careful", "muon") == 2e-3
    assert load_recipe(TRAINER, {"optim.lr": 7e-4}, preset="fast").optim.lr == 7e-4


def test_published_training_defaults_of_muonssm_and_mamba_slm():
    ssm, slm = load_recipe("muonssm/muonlonghorn-170m"), load_recipe("mamba_slm/pretrain", preset="published")
    assert (ssm.seed, ssm.optim.name, ssm.optim.lr, ssm.optim.wd, ssm.optim.betas) == (
        3407,
        "adamw",
        1e-3,
        0.1,
        (0.9, 0.95),
    )
    tokens, total = ssm.train.parse_budget()
    assert (tokens, total // tokens, ssm.train.micro_batch) == (2_097_152, 4768, 2)
    assert ssm.sched.warmup == round(0.01 * total / tokens)
    assert load_recipe("muonssm/muonlonghorn-170m", {"optim.name": "muon"}).optim.lr == 0.02
    assert (slm.seed, slm.optim.name, slm.optim.lr, slm.muon.adamw_lr, slm.optim.wd) == (
        8647,
        "muon",
        1e-3,
        1e-4,
        0.01,
    )
    assert (slm.train.global_batch, slm.train.steps, slm.sched.warmup) == (32_768, 100_000, 100)
