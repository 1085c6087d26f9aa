"""The table of mixers: a new one is a file and a line, and everybody who asks gets an answer; torch is not awaited."""

import subprocess
import sys

import pytest
import torch

import muonlm
from muonlm.cli.facts import describe
from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe
from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import (
    build_model,
    check_model,
    count_parameters,
    describe_layers,
    scan_choice,
    train_flops_per_token,
)
from muonlm.model.mixers import MIXERS, Entry
from muonlm.optim import route

# y_t = W s_t, s_t = ½ s_{t−1} + x_t: what a contributor would write
DECAY = """
import torch
from torch import nn

from muonlm.errors import UserError
from muonlm.model.mixers.base import Mixer


class Decay(Mixer):
    def __init__(self, cfg, rate):
        super().__init__(cfg)
        self.rate = rate
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.level = nn.Parameter(torch.empty(cfg.d_model))

    @classmethod
    def check(cls, cfg):
        if cfg.d_model > 512:
            raise UserError(f"`d_model` = {cfg.d_model} is too wide to decay; use `d_model` 512")

    def flops_between_tokens(self, length):
        return 6 * self.out.in_features

    def residual_projections(self):
        return [self.out]

    def init_special(self, cfg):
        self.level.fill_(1.0)

    def tags(self):
        return {self.out.weight: {"role": "matrix"}}

    def init_state(self, batch, device=None, dtype=None):
        return (torch.zeros(batch, self.out.in_features, device=device, dtype=dtype),)

    def forward(self, x, state=None, mask=None):
        (s,) = self.init_state(len(x), x.device, x.dtype) if state is None else state
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        outputs = []
        for token, present in zip(x.unbind(1), real.unsqueeze(-1).unbind(1)):
            s = torch.lerp(s, self.rate * s + token * self.level, present)
            outputs.append(s)
        y = self.out(torch.stack(outputs, 1))
        return y * real[..., None], (s,)
"""

# minGRU (2410.01201): h_t = (1 − z_t) h_{t−1} + z_t h̃_t, a diagonal scan with N = 1, 1 − z = exp(Δ A), A = −1. It has
# neither a short convolution nor a Muon form. Of `Mixer` alone it brings the state itself.
GRU = """
import torch
import torch.nn.functional as F
from torch import nn

from muonlm.model.mixers.base import Mixer, Recurrent, diagonal_scan_flops
from muonlm.model.norm import at_least_fp32
from muonlm.model.packing import compact
from muonlm.scan import diag_scan


class Gru(Recurrent):
    scan = "diag_scan"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.state_shape = (1, cfg.d_model)
        self.zh = nn.Linear(cfg.d_model, 2 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def flops_between_tokens(self, length):
        return diagonal_scan_flops(*self.state_shape)

    def residual_projections(self):
        return [self.out]

    def tags(self):
        d = self.out.in_features
        return {self.zh.weight: {"role": "matrix", "split": (0, [d, d])}}

    def forward(self, x, state=None, mask=None):
        x, lengths, undo = compact(x, mask)
        zh = self.zh(x)
        with torch.autocast(x.device.type, enabled=False):
            z, h = at_least_fp32(zh).chunk(2, -1)
            one = torch.ones_like(z[..., :1])
            gate = F.softplus(z), -torch.ones_like(z[0, 0, :, None])
            y, S, _ = diag_scan(gate, z.sigmoid() * h, one, one, *(state or ()), **self.how(lengths))
        return undo(self.out(y.to(zh.dtype))), (S,)


class PlainGru(Mixer):
    scan = "diag_scan"
    forward, residual_projections = Gru.forward, Gru.residual_projections

    def __init__(self, cfg):
        super().__init__(cfg)
        self.zh = nn.Linear(cfg.d_model, 2 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def how(self, lengths):
        return {"lengths": lengths, "backend": self.backend}
"""


@pytest.fixture
def guests(tmp_path, monkeypatch):
    """The files, and the lines in the table."""
    package = tmp_path / "guests"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "decay.py").write_text(DECAY)
    (package / "gru.py").write_text(GRU)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MIXERS, "E", Entry("E", "decay", "guests.decay:Decay", {"rate": 0.5}))
    monkeypatch.setitem(MIXERS, "U", Entry("U", "min_gru", "guests.gru:Gru"))
    monkeypatch.setitem(MIXERS, "P", Entry("P", "plain_gru", "guests.gru:PlainGru"))
    yield
    for name in ("guests", "guests.decay", "guests.gru"):
        sys.modules.pop(name, None)


def test_a_new_mixer_is_counted_routed_decoded_and_refused_through_the_table_alone(guests):
    cfg = ModelConfig(pattern="decay,attention", n_layer=2, d_model=32, n_head=2, mlp="none", vocab_size=50)
    assert cfg.pattern == "EA"
    assert [facts["mixer"] for facts in describe_layers(cfg)] == ["decay", "attention"]
    assert count_parameters(cfg)["blocks"] == (32 + 32 * 32 + 32) + (32 + 4 * 32 * 32 + 2 * 16)
    alone = ModelConfig(pattern="E", n_layer=1, d_model=32, n_head=3, mlp="none", vocab_size=50)
    assert train_flops_per_token(alone) == 6 * (32 + 32 * 32 + 32) + 6 * 32 + 6 * 50 * 32
    model = build_model(cfg, seed=1).double().eval()
    assert model.context == cfg.block_size and build_model(alone).context is None
    routes = {decision.name: decision.route for decision in route(model).decisions}
    assert routes["blocks.0.mixer.out.weight"] == "muon" and routes["blocks.0.mixer.level"] == "adamw"
    x = torch.randint(0, 50, (2, 9))
    whole, state = model(x)[0], model.init_state(2, dtype=torch.float64)
    for t in range(9):
        y, state = model(x[:, t : t + 1], state=state)
        torch.testing.assert_close(y[:, 0], whole[:, t], rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="use `d_model` 512"):
        check_model(ModelConfig(pattern="E", d_model=1024))


def test_a_hybrid_with_a_new_mixer_trains_saves_and_speaks(guests, smoke, tmp_path, capsys):
    """Two steps of the real loop, with packed documents; then the run is loaded, described and continues a text."""
    out = tmp_path / "run"
    flags = ["--model.pattern", "EA", "--data.reset", "true", "--train.steps", "2"]
    assert main(smoke(out, *flags)) == 0
    assert "E decay" in str(pytest.raises(UserError, ModelConfig, pattern="?").value)
    model, tokenizer = muonlm.load(out)
    assert type(model.blocks[0].mixer).__name__ == "Decay"
    assert len(muonlm.generate(model, tokenizer, "the people", max_tokens=5)) > 0
    facts = describe(load_recipe("quickstart", {"model.pattern": "EA", "model.d_model": "64"}))
    assert [layer["mixer"] for layer in facts["layers"][:2]] == ["decay", "attention"]
    # before data is looked at
    assert main(smoke(tmp_path / "wide", *flags, "--model.d_model", "1024", "--data", "nowhere.txt")) == 2
    assert "use --model.d_model 512" in capsys.readouterr().err and not (tmp_path / "wide").exists()


@pytest.mark.parametrize("letter", "UP")
def test_a_recurrence_is_known_by_the_scan_that_it_names_and_not_by_its_class(guests, letter):
    """The backend is chosen and said, and one that cannot run is refused before training begins."""
    keys, cpu = {"pattern": letter, "n_layer": 1, "d_model": 32, "n_head": 2, "vocab_size": 50}, torch.device("cpu")
    assert scan_choice(ModelConfig(**keys), cpu) in ("cpu", "chunked")
    assert scan_choice(ModelConfig(**keys, scan="reference"), cpu) == "reference"
    assert scan_choice(ModelConfig(**keys | {"pattern": "A"}), cpu) == ""
    with pytest.raises(UserError, match="triton"):
        scan_choice(ModelConfig(**keys, scan="triton"), cpu)


def test_a_recurrence_without_convolution_or_muon_form_needs_no_more_than_its_own_lines(guests):
    cfg = ModelConfig(pattern="U", n_layer=1, d_model=32, n_head=2, mlp="none", vocab_size=50, scan="chunked")
    model = build_model(cfg, seed=1).double().eval()
    assert train_flops_per_token(cfg) == 6 * (32 + 64 * 33 + 32 * 32) + 35 * 32 + 6 * 50 * 32
    x, h = torch.randn(1, 9, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    mixer, outputs = model.blocks[0].mixer, []
    for token in x[0]:
        z, new = mixer.zh(token).chunk(2)
        h = (1 - z.sigmoid()) * h + z.sigmoid() * new
        outputs.append(mixer.out(h))
    y, (S,) = mixer(x)
    torch.testing.assert_close(y[0], torch.stack(outputs), rtol=0, atol=1e-12)
    torch.testing.assert_close(S[0, 0], h, rtol=0, atol=1e-12)
    assert mixer.init_state(3, dtype=torch.bfloat16)[0].dtype == torch.float32


def test_a_name_that_is_nearly_right_wins_over_letters_of_another_case(guests):
    """g, r and u are letters of other mixers, in the other case or in this one."""
    said = str(pytest.raises(UserError, ModelConfig, pattern="gru").value)
    assert "Did you mean 'min_gru'?" in said and "Write" not in said and ", U min_gru" in said


@pytest.mark.parametrize("letter", MIXERS)
def test_every_line_of_the_table_is_a_mixer_that_answers(letter):
    """With the sizes of ModelConfig's defaults. A Muon form is told from its plain form by the table alone."""
    entry, cfg = MIXERS[letter], ModelConfig(pattern=letter, delta_heads=2)
    assert entry.letter == letter and MIXERS[ModelConfig(pattern=entry.name).pattern] is entry
    with torch.device("meta"):
        mixer = entry.build(cfg)
    assert mixer.flops_between_tokens(64) > 0 and mixer.residual_projections()
    assert mixer.look_back in (None, cfg.block_size)
    assert mixer.init_state(2)[0].shape[0] == 2
    assert not entry.muon or entry.load() in [other.load() for other in MIXERS.values() if not other.muon]


def test_the_tables_are_read_without_torch():
    code = "import sys; from muonlm.model import KINDS; from muonlm.model.mixers import letters; letters('MA')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
