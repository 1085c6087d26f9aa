"""The grokking transformer: equal to the plain one, its prefix tree, counts, initial values, learning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonlm.config.schema import ModelConfig
from muonlm.data.synthetic.modular import ModularData
from muonlm.model.grokking import ModularTransformer, prefix_tree


def transformer(vocab_size: int, **widths) -> ModularTransformer:
    size = {"d_model": 128, "n_layer": 2, "n_head": 4, "d_ff": 512} | widths
    return ModularTransformer(ModelConfig(kind="modular", vocab_size=vocab_size, block_size=5, **size))


class PlainTransformer(nn.Module):
    """The definition: every position of every row, torch's own post-norm layer; with a ModularTransformer's weights."""

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


NAMES = {
    "qkv.": "self_attn.in_proj_",
    "out.": "self_attn.out_proj.",
    "attention_norm.": "norm1.",
    "mlp_norm.": "norm2.",
    "up.": "linear1.",
    "down.": "linear2.",
}


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
    fast = transformer(24, d_model=32, n_layer=n_layer, n_head=4, d_ff=48).double()
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
    count = {vocab: sum(p.numel() for p in transformer(vocab).parameters()) for vocab in (234, 231)}
    assert count == {234: 457_578, 231: 456_807}
    assert sum(p.numel() for p in transformer(234).blocks.parameters()) == 396_544


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
    model = transformer(24)
    logits = model(torch.empty(0, 5, dtype=torch.int64))
    F.cross_entropy(logits, torch.empty(0, dtype=torch.int64), reduction="sum").backward()
    assert logits.shape == (0, 24)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_initialisation_follows_the_seed_and_the_documented_scales():
    first, second, other = (torch.manual_seed(s) and transformer(234).state_dict() for s in (1, 1, 2))
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
        model = transformer(234)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    direct = transformer(234)
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
    model = transformer(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    assert (model(batch.inputs).argmax(-1) == batch.targets).float().mean() > 0.95  # chance: 1/31
