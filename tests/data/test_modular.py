"""The grokking data and model: the arithmetic against Python integers, the fast model against the plain one written twice as long."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonlm.data.synthetic.modular import OPERATIONS, ModularData
from muonlm.errors import UserError
from muonlm.model.grokking import ModularTransformer, prefix_tree


def rows_of(data) -> set[tuple[int, int, int]]:
    return {(r["a"], r["b"], r["answer"]) for r in data.rows_as_dicts()}


def both_splits(**options) -> set[tuple[int, int, int]]:
    return rows_of(ModularData(split="train", **options)) | rows_of(ModularData(split="val", **options))


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(batches)
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


# ---- data


def test_prime_223_has_the_documented_sizes():
    train, val = ModularData(), ModularData(split="val")
    assert (len(train), len(val)) == (24_753, 24_753)
    assert train.steps_per_epoch == 49 and train.batch(48).count == 24_753 - 48 * 512
    assert train.vocab_size == val.vocab_size == 234
    assert ModularData(op="x+y", operations=6).vocab_size == 231
    assert ModularData(prime=97).vocab_size == 108


# Each operation in Python's own integers, by search where it divides: independent of inverses and of numpy.
BY_DEFINITION = {
    "x+y": lambda x, y, c, p: c == (x + y) % p,
    "x-y": lambda x, y, c, p: c == (x - y) % p,
    "x/y": lambda x, y, c, p: c * y % p == x,
    "(x//y)if(y%2==1)else(x-y)": lambda x, y, c, p: c * y % p == x if y % 2 else c == (x - y) % p,
    "x^2+y^2": lambda x, y, c, p: c == (x * x + y * y) % p,
    "x^2+xy+y^2": lambda x, y, c, p: c == (x * x + x * y + y * y) % p,
    "x^2+xy+y^2+x": lambda x, y, c, p: c == (x * x + x * y + y * y + x) % p,
    "x^3+xy": lambda x, y, c, p: c == (x * x * x + x * y) % p,
    "x^3+xy^2+x": lambda x, y, c, p: c == (x * x * x + x * y * y + x) % p,
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_pair_occurs_once_with_the_answer_of_the_definition(op):
    p = 23
    rows = both_splits(op=op, prime=p)
    first = 1 if op in ("x/y", "(x//y)if(y%2==1)else(x-y)") else 0
    assert {(a, b) for a, b, _ in rows} == {(a, b) for a in range(p) for b in range(first, p)}
    assert len(rows) == p * (p - first)
    assert all(0 <= c < p and BY_DEFINITION[op](a, b, c, p) for a, b, c in rows)


def test_the_row_of_the_feature_contract_is_there_and_its_tokens_spell_it():
    assert (12, 7, 161) in both_splits()  # 161·7 = 1127 = 5·223 + 12
    data = ModularData()
    eos, a, op, b, equals = data.inputs[0].tolist()
    row = data.rows_as_dicts()[0]
    assert (eos, op, equals) == (0, 2 + list(OPERATIONS).index("x/y"), 1) and row["op"] == "/"
    assert (a - 11, b - 11, int(data.targets[0]) - 11) == (row["a"], row["b"], row["answer"])


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.9])
def test_train_and_validation_share_no_row_and_miss_none(fraction):
    train, val = (ModularData(prime=97, train_fraction=fraction, split=s) for s in ("train", "val"))
    assert not rows_of(train) & rows_of(val)
    assert len(rows_of(train) | rows_of(val)) == len(train) + len(val) == 97 * 96
    assert len(train) == round(fraction * 97 * 96)


def test_the_split_depends_on_split_seed_alone_and_looks_drawn_at_random():
    assert ModularData(prime=97, seed=1).fingerprint == ModularData(prime=97, seed=2, rows=7).fingerprint
    assert ModularData(prime=97).fingerprint != ModularData(prime=97, split_seed=43).fingerprint
    assert ModularData(prime=97).fingerprint != ModularData(prime=97, split="val").fingerprint
    count = np.zeros(97, int)
    for a, _, _ in rows_of(ModularData(prime=97)):
        count[a] += 1
    # 48 ± 4.9 of 96 for each a, were it 97 coins thrown 96 times: 5 standard deviations, for 97 values and one fixed draw
    assert abs(count - 48).max() < 25 and count.std() > 2.5


def test_an_epoch_takes_every_row_once_and_the_next_one_in_another_order():
    data = ModularData(prime=31, rows=64)
    m = data.steps_per_epoch
    first, _ = joined(data.batch(s) for s in range(m))
    second, _ = joined(data.batch(s) for s in range(m, 2 * m))
    whole = sorted(map(tuple, data.inputs.tolist()))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist())) == whole
    assert not torch.equal(first, second) and not torch.equal(first, data.inputs)
    again = ModularData(prime=31, rows=64).batch(m + 1)
    assert torch.equal(again.inputs, data.batch(m + 1).inputs) and torch.equal(again.targets, data.batch(m + 1).targets)
    assert not torch.equal(ModularData(prime=31, rows=64, seed=9).batch(0).inputs, data.batch(0).inputs)


@pytest.mark.parametrize("world", [2, 3, 70])
def test_the_ranks_together_hold_the_batch_of_one_process(world):
    data = ModularData(prime=31, rows=64)
    for step in (0, data.steps_per_epoch - 1, data.steps_per_epoch):
        whole = data.batch(step)
        shares = [data.batch(step, rank, world) for rank in range(world)]
        inputs, targets = joined(shares)
        assert torch.equal(inputs, whole.inputs) and torch.equal(targets, whole.targets)
        assert sum(b.count for b in shares) == whole.count == len(whole.targets)
        assert max(b.count for b in shares) - min(b.count for b in shares) <= 1
    inputs, targets = joined(b for rank in range(world) for b in data.sequential(10, rank, world))
    assert torch.equal(inputs, data.inputs) and torch.equal(targets, data.targets)


def test_micro_batches_of_a_batch_keep_all_rows_and_counts():
    batch = ModularData(prime=31, rows=64).batch(0)
    parts = batch.split(24)
    assert [b.count for b in parts] == [24, 24, 16]
    assert torch.equal(joined(parts)[1], batch.targets) and batch.targets.shape == (64,)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"op": "/"}, "did you mean 'x/y'"),
        ({"op": "x^2+y2"}, "did you mean 'x^2+y^2'"),
        ({"op": "x^3+xy", "operations": 6}, "unknown operation"),
        ({"prime": 221}, "not a prime number; the nearest is 223"),
        ({"prime": -5}, "nearest is 2"),
        ({"prime": 5003}, "largest prime taken is 4093"),
        ({"train_fraction": 1.0}, "between 0 and 1"),
        ({"train_fraction": 0.0}, "between 0 and 1"),
        ({"train_fraction": float("nan")}, "between 0 and 1"),
        ({"split": "test"}, "'train' or 'val'"),
        ({"rows": 0}, "at least 1 row"),
        ({"operations": 10}, "1 to 9 operations"),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(options, text):
    with pytest.raises(UserError) as caught:
        ModularData(**options)
    assert text in str(caught.value)


# ---- model


class PlainTransformer(nn.Module):
    """The definition: every position of every row, torch's own post-norm layer. Takes the weights of a ModularTransformer."""

    def __init__(self, fast: ModularTransformer, n_head: int, d_ff: int):
        super().__init__()
        vocab_size, d = fast.embed.weight.shape
        layer = nn.TransformerEncoderLayer(d, n_head, d_ff, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, len(fast.blocks), nn.LayerNorm(d), enable_nested_tensor=False)
        self.embed, self.head = nn.Embedding(vocab_size, d), nn.Linear(d, vocab_size)
        self.positions = nn.Parameter(torch.empty_like(fast.positions))
        self.double().load_state_dict({plain: p.detach() for plain, p in renamed(fast.named_parameters())})

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=self.positions.dtype).triu(1)
        x = self.embed(tokens) + self.positions
        return self.head(self.encoder(x, mask=mask))[:, -1]


NAMES = {"qkv.": "self_attn.in_proj_", "out.": "self_attn.out_proj.", "attention_norm.": "norm1.", "mlp_norm.": "norm2.",
         "up.": "linear1.", "down.": "linear2."}  # fmt: skip


def renamed(named):
    """(name in torch's TransformerEncoder, tensor) of each (our name, tensor)."""
    for name, tensor in named:
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            ours = rest[: rest.index(".") + 1]
            name = f"encoder.layers.{i}.{NAMES[ours]}{rest.removeprefix(ours)}"
        elif name.startswith("norm."):
            name = f"encoder.{name}"
        yield name, tensor


def modular_rows(rows: int) -> torch.Tensor:
    return ModularData(prime=13, rows=rows).batch(0).inputs


def any_rows(rows: int) -> torch.Tensor:
    return torch.randint(0, 24, (rows, 5), generator=torch.Generator().manual_seed(0))


TOKENS = {
    "rows of modular data": modular_rows(50),
    "unrelated rows": any_rows(20),
    "three distinct rows, repeated": any_rows(3).repeat(4, 1),
    "one row": any_rows(1),
    "rows that end alike but start differently": torch.cat([any_rows(9)[:, :2], any_rows(1)[:, 2:].expand(9, 3)], 1),
}


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_logits_and_gradients_are_those_of_the_plain_transformer(tokens, n_layer):
    torch.manual_seed(0)
    fast = ModularTransformer(24, d_model=32, n_layer=n_layer, n_head=4, d_ff=48).double()
    with torch.no_grad():
        for p in fast.parameters():  # away from the special values of the initialisation: biases 0, norms 1
            p.add_(0.3 * torch.randn_like(p))
    plain = PlainTransformer(fast, 4, 48)
    probe = torch.randn(len(tokens), 24, dtype=torch.float64)
    outputs = [model(tokens) for model in (fast, plain)]
    for out in outputs:
        (out * probe).sum().backward()
    # fp64 unit roundoff 1.1e-16 times a few thousand additions in another order: about 1e-13 relative
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, gradient in renamed((n, p.grad) for n, p in fast.named_parameters()):
        error = (gradient - expected[name]).abs().max().item()
        assert error <= 1e-12 * max(1.0, expected[name].abs().max().item()), (name, error)


def test_parameter_counts_are_the_documented_ones():
    count = {vocab: sum(p.numel() for p in ModularTransformer(vocab).parameters()) for vocab in (234, 231)}
    assert count == {234: 457_578, 231: 456_807}
    assert sum(p.numel() for p in ModularTransformer(234).blocks.parameters()) == 396_544


def test_the_prefix_tree_holds_each_prefix_once_and_every_path_spells_its_row():
    tokens = ModularData().batch(0).inputs
    token, position, node_path, row_path = prefix_tree(tokens, 234)
    prefixes = {tuple(row[: t + 1]) for row in tokens.tolist() for t in range(5)}
    assert len(token) == len(prefixes) < 0.6 * tokens.numel()
    assert torch.equal(token[row_path], tokens)
    assert torch.equal(position[row_path], torch.arange(5).expand_as(tokens))
    for node in range(0, len(token), 37):
        t = int(position[node])
        assert int(node_path[node, t]) == node
        assert tuple(token[node_path[node, : t + 1]].tolist()) in prefixes


def test_a_rank_without_rows_gets_no_logits_and_zero_gradients():
    model = ModularTransformer(24)
    logits = model(torch.empty(0, 5, dtype=torch.int64))
    F.cross_entropy(logits, torch.empty(0, dtype=torch.int64), reduction="sum").backward()
    assert logits.shape == (0, 24)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_initialisation_follows_the_seed_and_the_documented_scales():
    first, second, other = (torch.manual_seed(s) and ModularTransformer(234).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    # 640 normal numbers: their standard deviation is known to 3 %; five times that
    assert abs(first["embed.weight"].std() - 1) < 0.05 and abs(first["positions"].std() - 1) < 0.15
    bound = (6 / (128 + 384)) ** 0.5
    assert 0.99 * bound < first["blocks.0.qkv.weight"].abs().max() <= bound
    assert 0.99 * 128**-0.5 < first["blocks.1.up.weight"].abs().max() <= 128**-0.5
    assert not first["blocks.0.qkv.bias"].any() and not first["blocks.0.out.bias"].any()
    assert first["head.bias"].any() and first["blocks.0.down.bias"].any()


def test_a_model_built_on_meta_is_the_same_after_init_weights_tags_included():
    with torch.device("meta"):
        model = ModularTransformer(234)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    direct = ModularTransformer(234)
    torch.manual_seed(3)
    direct.init_weights()
    for (name, p), q in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(p, q) and getattr(p, "muonlm", None) == getattr(q, "muonlm", None), name
    assert model.blocks[1].qkv.weight.muonlm == {"role": "matrix", "split": (0, [128, 128, 128]), "heads": (0, 12)}
    assert model.positions.muonlm == {"role": "scalar"}
    assert model.head.weight.muonlm == {"role": "head"} and model.embed.weight.muonlm == {"role": "embed"}


def test_a_few_steps_of_adamw_learn_the_rows_of_one_batch():
    torch.manual_seed(0)
    batch = ModularData(prime=31, rows=64).batch(0)
    model = ModularTransformer(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    assert (model(batch.inputs).argmax(-1) == batch.targets).float().mean() > 0.95  # chance: 1/31
