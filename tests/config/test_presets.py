"""Presets: the published six of the trainer family, and one's own in muonlm.toml, in our own keys."""

import json

import pytest

from muonlm.cli.main import main
from muonlm.config.recipes import RECIPES, USERS_FILE, load_recipe, presets, read_recipe
from muonlm.config.schema import Config, flatten
from muonlm.errors import UserError

RECIPE = "mamba_trainer/small"
SIZES = [str(p.relative_to(RECIPES).with_suffix("")) for p in sorted((RECIPES / "mamba_trainer").glob("*.toml"))]
SIZES.remove("mamba_trainer/hybrid-cpu")  # quickstart's schedule, not the family's
ALONE = {"init_from": "none"}  # whatever runs lie here
SIX = {"fast", "default", "careful", "muon_fast", "muon_default", "muon_careful"}
SAMPLES = {"muon_custom", "muon_stable"}


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """preset(text) writes [presets.mine] into the current folder's muonlm.toml."""
    monkeypatch.chdir(tmp_path)
    return lambda text: (tmp_path / USERS_FILE).write_text("[presets.mine]\n" + text, "utf-8")


def config(recipe=RECIPE, flags=None, name="mine", **options) -> Config:
    return load_recipe(recipe, flags, preset=name, **options)


def begin(capsys, *argv: str) -> tuple[int, dict, str]:
    """Exit code, resolved config and what was said of `muonlm train … --dry-run`."""
    code = main(["train", *argv, "--dry-run", "--json"])
    out, err = capsys.readouterr()
    return code, flatten(json.loads(out)), err


@pytest.mark.parametrize("recipe", SIZES)
def test_every_size_of_the_trainer_family_has_the_six_presets_the_two_samples_and_tuned_rates(recipe):
    assert set(read_recipe(recipe)["preset"]) == SIX | SAMPLES | {"published", "tuned"}
    assert load_recipe(recipe, ALONE, preset="muon_stable").optim.lr == 1.5e-3


@pytest.mark.parametrize("recipe", [*SIZES, "mamba_slm/pretrain", "mamba_slm/sft"])
def test_tuned_rates_stand_beside_the_published_ones_with_a_scale_of_their_own(recipe):
    """The published rates are in units of another optimizer."""
    own, published, tuned = (load_recipe(recipe, ALONE, preset=name) for name in ("", "published", "tuned"))
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


def test_without_a_file_there_are_those_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert presets("quickstart") == {} and set(presets(RECIPE)) == set(read_recipe(RECIPE)["preset"])


def test_our_own_keys_work_in_every_way_toml_writes_them(preset):
    preset(
        'optim.lr = 0.011\n"sched.warmup" = 12\n[presets.mine.train]\nsave-every = 13\n[presets.mine.eval]\nevery = 14'
    )
    cfg = config()
    assert (cfg.optim.lr, cfg.sched.warmup, cfg.train.save_every, cfg.eval.every) == (0.011, 12, 13, 14)


def test_a_rate_is_that_of_the_optimizer_the_preset_names(preset):
    preset('optim.name = "adamw"\noptim.lr = 4.5e-4')
    assert config().optim.lr == 4.5e-4
    preset("optim.lr = 4.5e-2")  # Muon's: never AdamW's
    assert config(flags={"optim.name": "adamw"}).optim.lr == load_recipe(RECIPE, preset="default").optim.lr
    preset("optim.lr = 4.5e-2\nbaseline.optim.lr = 6e-4")
    assert config(flags={"optim.name": "adamw"}).optim.lr == 6e-4 and config().optim.lr == 4.5e-2


def test_a_length_replaces_that_of_the_recipe_and_flags_replace_both(preset):
    preset("train.steps = 80_000")
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


def test_a_preset_of_ones_own_comes_before_the_recipes_and_smoke_before_both(preset, tmp_path):
    (tmp_path / USERS_FILE).write_text("[presets.fast]\noptim.lr = 9e-3")
    cfg = config(name="fast")
    assert (cfg.optim.lr, cfg.optim.name, cfg.train.steps) == (9e-3, "muon", 60_000)
    preset("train.steps = 80_000")
    assert config(smoke=True).train.steps == 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "learning_rate = 1e-3",
            r"unknown key 'learning_rate' \(muonlm.toml \[presets.mine\]\). Did you mean 'optim.lr'",
        ),
        ("logging_steps = 5", "Did you mean 'log.every'"),
        ("eval_interval = 5", "Did you mean 'eval.every'"),
        ("max_grad_norm = 1", "Did you mean 'optim.grad_clip'"),
        ("label_smoothing = 0.1", "Did you mean 'dpo.label_smoothing'"),
        ("momentum = 0.9", "Did you mean 'muon.momentum'"),
        ("optim.lrr = 1", "unknown key 'optim.lrr'.*Did you mean 'optim.lr'"),
        ("optim.lr = -1", r"optim.lr = -1.0 \(muonlm.toml \[presets.mine\]\) must be above 0"),
        ("baseline.optim.lr = -1", r"optim.lr = -1.0 \(muonlm.toml \[presets.mine\] baseline\) must be above 0"),
        ('init_from = "runs/x"', "init_from cannot be set by a preset"),
        ("optim.lr = ", "not valid TOML"),
    ],
)
def test_what_cannot_act_is_refused_with_its_name_and_place(preset, text, said):
    preset(text)
    with pytest.raises(UserError, match=said):
        config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[preset.mine]\nmuon.momentum = 0.9", "has 'preset'.*Did you mean 'presets'"),
        ("[presets]\nmomentum = 0.9", r"write \[presets.NAME\]"),
        ("presets = 3", r"write \[presets.NAME\]"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / USERS_FILE).write_text(text)
    with pytest.raises(UserError, match=said):
        config()


def test_a_run_begins_by_saying_what_its_preset_sets_and_where_it_stands(preset, capsys):
    preset("optim.lr = 2.5e-3\ntrain.steps = 80_000")
    code, found, err = begin(capsys, RECIPE, "--preset", "mine", "--train.steps", "5000")
    assert code == 0 and (found["optim.lr"], found["train.steps"]) == (2.5e-3, 5000)
    assert err == "muonlm.toml [presets.mine]: optim.lr 0.0025, train.steps 80000\n"
    code, _, err = begin(capsys, RECIPE, "--preset", "fast")
    assert code == 0 and err.startswith(f"recipe {RECIPE} [preset.fast]: optim.name adamw, ")


def test_a_mistake_in_the_file_does_not_stop_runs_that_use_no_preset(preset, capsys):
    preset("nonsense = 1")
    assert begin(capsys, RECIPE)[0] == 0
    capsys.readouterr()
    assert main(["train", RECIPE, "--preset", "mine", "--dry-run"]) == 2


# --- epochs, tokens or steps ------------------------------------------------------------------------------------------


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
