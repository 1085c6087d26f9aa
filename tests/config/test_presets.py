"""Presets: the published six of the trainer family, and one's own in muonlm.toml: every key acts or is refused."""

import json

import pytest

from muonlm.cli.main import main
from muonlm.config.presets import FILE, PUBLISHED, user_presets
from muonlm.config.recipes import RECIPES, load_recipe, read_recipe
from muonlm.config.schema import Config, flatten
from muonlm.errors import UserError

RECIPE = "mamba_trainer/small"
SIZES = [str(p.relative_to(RECIPES).with_suffix("")) for p in sorted((RECIPES / "mamba_trainer").glob("*.toml"))]
SIZES.remove("mamba_trainer/hybrid-cpu")  # quickstart's schedule, not the family's
SIX = {"fast", "default", "careful", "muon_fast", "muon_default", "muon_careful"}
SAMPLES = {"muon_custom", "muon_stable"}
TELLING = {  # a value of each published name that no recipe has, and what it must become
    "learning_rate": (1.7e-3, {"optim.lr": 1.7e-3}),
    "weight_decay": (0.07, {"optim.wd": 0.07, "muon.adamw_wd": 0.07}),
    "max_steps": (81_000, {"train.steps": 81_000}),
    "warmup_steps": (77, {"sched.warmup": 77}),
    "eval_interval": (55, {"eval.every": 55}),
    "save_interval": (44, {"train.save_every": 44}),
    "logging_steps": (33, {"log.every": 33}),
    "adam_beta1": (0.77, {"optim.betas": (0.77, 0.95)}),
    "adam_beta2": (0.88, {"optim.betas": (0.9, 0.88)}),
    "adam_epsilon": (1e-7, {"optim.eps": 1e-7}),
    "max_grad_norm": (0.3, {"optim.grad_clip": 0.3, "optim.clip_mode": "clip"}),
    "momentum": (0.91, {"muon.momentum": 0.91, "muon.momentum_warmup": ""}),
}


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """preset(text) writes [presets.mine] into the current folder's muonlm.toml."""
    monkeypatch.chdir(tmp_path)
    return lambda text: (tmp_path / FILE).write_text("[presets.mine]\n" + text, "utf-8")


def config(recipe=RECIPE, flags=None, name="mine", **options) -> Config:
    return load_recipe(recipe, flags, preset=name, presets=user_presets(recipe=recipe), **options)


def begin(capsys, *argv: str) -> tuple[int, dict, str]:
    """Exit code, resolved config and what was said of `muonlm train … --dry-run`."""
    code = main(["train", *argv, "--dry-run", "--json"])
    out, err = capsys.readouterr()
    return code, flatten(json.loads(out)), err


@pytest.mark.parametrize("recipe", SIZES)
def test_every_size_of_the_trainer_family_has_the_six_presets_the_two_samples_and_tuned_rates(recipe):
    assert set(read_recipe(recipe)["preset"]) == SIX | SAMPLES | {"published", "tuned"}
    assert load_recipe(recipe, preset="muon_stable").optim.lr == 1.5e-3


@pytest.mark.parametrize("recipe", [*SIZES, "mamba_slm/pretrain", "mamba_slm/sft"])
def test_tuned_rates_stand_beside_the_published_ones_with_a_scale_of_their_own(recipe):
    """families.md R1: the published rates are in units of another optimizer."""
    own, published, tuned = (load_recipe(recipe, preset=name) for name in ("", "published", "tuned"))
    assert (own.optim, own.muon) == (published.optim, published.muon)
    assert own.muon.lr_mode == "none" and tuned.muon.lr_mode == "original"
    assert tuned.optim.lr > 4 * own.optim.lr and tuned.muon.adamw_lr > 4 * own.muon.adamw_lr


@pytest.mark.parametrize("name", sorted(SIX))
def test_all_published_presets_decay_linearly_to_zero_with_weight_decay_a_tenth(name):
    cfg = load_recipe("mamba_trainer/hybrid-medium", preset=name)
    found = (cfg.sched.kind, cfg.sched.end_factor, cfg.optim.wd, cfg.optim.name)
    assert found == ("linear", 0.0, 0.1, "muon" if "muon" in name else "adamw")


def test_info_presets_lists_all_of_a_recipe(capsys):
    assert main(["info", "mamba_trainer/medium", "--presets"]) == 0
    out = capsys.readouterr().out
    assert all(f"--preset {name}" in out for name in SIX | SAMPLES)


def test_an_unknown_preset_says_so_names_it_and_lists_known_ones(capsys):
    assert main(["train", RECIPE, "--preset", "slow"]) == 2
    err = capsys.readouterr().err
    assert "'slow'" in err and all(name in err for name in SIX)


# --- of one's own -----------------------------------------------------------------------------------------------------


def test_without_a_file_there_are_none(tmp_path):
    assert user_presets(tmp_path) == {} == user_presets(tmp_path / "absent")


def test_every_published_name_is_tried_here():
    assert set(TELLING) | {"label_smoothing"} == set(PUBLISHED)


@pytest.mark.parametrize("recipe", [RECIPE, "minimind/pretrain", "quickstart"])
@pytest.mark.parametrize("name", TELLING)
def test_a_published_name_changes_the_run_and_nothing_else(preset, name, recipe):
    value, expected = TELLING[name]
    preset(f"{name} = {value}")
    before, after = flatten(load_recipe(recipe).to_dict()), flatten(config(recipe).to_dict())
    if name.startswith("adam_beta"):  # the other half stays the recipe's: quickstart's first is 0.8
        half = int(name[-1]) - 1
        pair = list(before["optim.betas"])
        pair[half] = value
        expected = {"optim.betas": pair}
    expected = json.loads(json.dumps(expected))
    assert {key: after[key] for key in expected} == expected
    free = {"train.epochs", "train.tokens", "train.budget"} if name == "max_steps" else set()
    assert {key for key in after if after[key] != before[key]} <= set(expected) | free
    assert any(after[key] != before[key] for key in expected)


@pytest.mark.parametrize("name", sorted(TELLING.keys() - {"momentum"}))
def test_a_published_name_changes_a_run_under_adamw_as_well(preset, name):
    """quickstart's [baseline] sets rate, decay, betas and eps, and would have the last word."""
    value, expected = TELLING[name]
    preset(f"{name} = {value}")
    after = flatten(config("quickstart", {"optim.name": "adamw"}).to_dict())
    key, wanted = next(iter(expected.items()))
    if name.startswith("adam_beta"):
        wanted = [value, 0.95] if name == "adam_beta1" else [0.9, value]  # the baseline's pair is 0.9, 0.95
    assert after[key] == wanted


def test_learning_rate_leaves_the_rate_of_what_adamw_takes_beside_muon(preset):
    preset("learning_rate = 2.5e-3")
    cfg = config()
    assert (cfg.optim.lr, cfg.muon.adamw_lr) == (2.5e-3, load_recipe(RECIPE).muon.adamw_lr)


def test_our_own_keys_work_in_every_way_toml_writes_them(preset):
    preset(
        'optim.lr = 0.011\n"sched.warmup" = 12\n[presets.mine.train]\nsave-every = 13\n[presets.mine.eval]\nevery = 14'
    )
    cfg = config()
    assert (cfg.optim.lr, cfg.sched.warmup, cfg.train.save_every, cfg.eval.every) == (0.011, 12, 13, 14)


def test_our_own_rate_is_that_of_the_optimizer_the_preset_names(preset):
    preset('optim.name = "adamw"\noptim.lr = 4.5e-4')
    assert config().optim.lr == 4.5e-4
    preset("optim.lr = 4.5e-2")  # Muon's: never AdamW's
    assert config(flags={"optim.name": "adamw"}).optim.lr == load_recipe(RECIPE, preset="default").optim.lr
    preset("optim.lr = 4.5e-2\nbaseline.optim.lr = 6e-4")
    assert config(flags={"optim.name": "adamw"}).optim.lr == 6e-4 and config().optim.lr == 4.5e-2


def test_a_length_replaces_that_of_the_recipe_and_flags_replace_both(preset):
    preset("max_steps = 80_000")
    assert load_recipe("minimind/pretrain").train.epochs == 10
    assert (config("minimind/pretrain").train.steps, config("minimind/pretrain").train.epochs) == (80_000, 0)
    train = config("minimind/pretrain", {"train.epochs": "3"}).train
    assert (train.steps, train.epochs) == (0, 3)
    preset("train.epochs = 2")
    assert (config().train.steps, config().train.epochs) == (0, 2)


def test_a_size_of_the_step_replaces_that_of_the_recipe(preset):
    preset("train.accum = 4")
    assert load_recipe("minimind/pretrain").train.global_batch == 131_072
    train = config("minimind/pretrain").train
    assert (train.micro_batch, train.accum, train.global_batch) == (32, 4, 0)
    assert config(RECIPE).train.accum == 4  # which says it so itself


def test_no_clipping_is_written_as_zero(preset):
    preset("max_grad_norm = 0")
    assert config().optim.clip_mode == "off"


def test_a_preset_of_ones_own_comes_before_the_recipes(preset, tmp_path):
    (tmp_path / FILE).write_text("[presets.fast]\nlearning_rate = 9e-3")
    cfg = config(name="fast")
    assert (cfg.optim.lr, cfg.optim.name, cfg.train.steps) == (9e-3, "muon", 60_000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label_smoothing = 0.1", "label_smoothing = 0.1 would change nothing.*dpo.label_smoothing"),
        ("learning_rat = 1", r"\[presets.mine\]: unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ("optim.lrr = 1", "unknown key 'optim.lrr'. Did you mean 'optim.lr'"),
        ("learning_rate = 1e-3\noptim.lr = 2e-3", "optim.lr and learning_rate both set optim.lr; keep one"),
        ("adam_beta1 = 0.8\noptim.betas = [0.9, 0.9]", "both set optim.betas"),
        ('max_steps = "many"', "max_steps = 'many' should be a number"),
        ("momentum = true", "momentum = True should be a number"),
        ('init_from = "runs/x"', "init_from cannot be set by a preset; .*--init-from RUN"),
        ("learning_rate = ", "not valid TOML"),
    ],
)
def test_what_cannot_act_is_refused_with_its_name_and_place(preset, text, said):
    preset(text)
    with pytest.raises(UserError, match=said):
        user_presets(recipe=RECIPE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[preset.mine]\nmomentum = 0.9", "has 'preset'.*Did you mean 'presets'"),
        ("[presets]\nmomentum = 0.9", r"write \[presets.NAME\]"),
        ("presets = 3", r"write \[presets.NAME\]"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, said):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=said):
        user_presets(tmp_path)


def test_no_label_smoothing_is_what_all_runs_have(preset):
    preset("label_smoothing = 0.0")
    assert user_presets() == {"mine": {}}


def test_momentum_under_adamw_is_refused_on_the_command_line(preset, capsys):
    preset("momentum = 0.95")
    assert main(["train", RECIPE, "--preset", "mine", "--optim.name", "adamw", "--dry-run"]) == 2
    assert "momentum, which AdamW does not have (its own is adam_beta1)" in capsys.readouterr().err


def test_a_run_begins_by_saying_what_came_of_its_preset(preset, capsys):
    preset("learning_rate = 2.5e-3\nmax_steps = 80_000\nwarmup_steps = 2000\nadam_beta1 = 0.9")
    code, found, err = begin(capsys, RECIPE, "--preset", "mine", "--sched.warmup", "5")
    assert code == 0 and (found["optim.lr"], found["train.steps"], found["sched.warmup"]) == (2.5e-3, 80_000, 5)
    assert "preset mine (muonlm.toml, mamba_trainer/small; muon): " in err
    assert "optim.lr 0.0025" in err and "train.steps 80000" in err
    assert "sched.warmup 5 (the preset says 2000)" in err and "train.epochs" not in err and "warning" not in err
    code, found, err = begin(capsys, RECIPE, "--preset", "mine", "--smoke")
    assert code == 0 and "train.steps 30 (the preset says 80000)" in err


@pytest.mark.parametrize(
    ("text", "flags", "warned"),
    [
        ("adam_beta1 = 0.8", (), True),
        ("optim.betas = [0.8, 0.95]", (), True),
        ("adam_beta1 = 0.9", (), False),  # as the recipe has it
        ("adam_beta2 = 0.99", (), False),
        ("adam_beta1 = 0.8\nmomentum = 0.9", (), False),
        ("adam_beta1 = 0.8", ("--muon.momentum", "0.9"), False),
        ("adam_beta1 = 0.8", ("--optim.name", "adamw"), False),
    ],
)
def test_a_beta_changed_without_muons_momentum_is_warned_about(preset, capsys, text, flags, warned):
    preset(text)
    code, _, err = begin(capsys, RECIPE, "--preset", "mine", *flags)
    assert code == 0 and ("warning: preset mine changes adam_beta1 (0.9 → 0.8)" in err) == warned


def test_a_recipes_own_preset_is_told_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = begin(capsys, RECIPE, "--preset", "fast")
    assert code == 0 and "preset fast (mamba_trainer/small; adamw): " in err and "optim.lr 0.0005" in err


def test_a_mistake_in_the_file_does_not_stop_runs_that_use_no_preset(preset, capsys):
    preset("nonsense = 1")
    assert begin(capsys, RECIPE)[0] == 0
    capsys.readouterr()
    assert main(["train", RECIPE, "--preset", "mine", "--dry-run"]) == 2


# --- epochs, tokens or steps (SL-06) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"train.epochs": "1", "train.tokens": "10_000_000_000"}, 305_175),  # the published example
        ({"train.epochs": "2", "train.tokens": "10_400_000"}, 634),
        ({"train.epochs": "0.5", "train.tokens": "10_400_000"}, 159),  # 158.5
        ({"train.tokens": "10_400_000"}, 318),  # all tokens, the last batch too
        ({"train.steps": "77"}, 77),
        ({"train.epochs": "3", "train.tokens": "1000"}, 3),  # less than a step: not "as much as there is data"
    ],
)
def test_epochs_of_so_many_tokens_are_whole_steps_and_each_way_alone_still_works(flags, steps):
    cfg = load_recipe("mamba_slm/pretrain", flags)
    assert cfg.train.fixed_steps(32_768) == steps


@pytest.mark.parametrize("other", ["train.epochs", "train.tokens"])
def test_steps_go_with_nothing_else(other):
    with pytest.raises(UserError, match="both set the length"):
        load_recipe("mamba_slm/pretrain", {"train.steps": "5", other: "2"})
