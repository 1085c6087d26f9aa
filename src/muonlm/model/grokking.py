"""The small post-norm transformer of the grokking experiments, evaluated once per distinct prefix.

    x_t = E[token_t] + P_t                                                                          (1)
    per block   h = LN(x + W_o·attention(x) + b_o),   x ← LN(h + W_2·gelu(W_1 h + b_1) + b_2)       (2)
    logits = W_out·LN(x_T) + b_out, at the last position T only

Post-norm, exact (erf) GELU, causal attention with softmax scale 1/√(d/H), no dropout.

The function is that of the plain model, and so are its gradients; only work that the logits do not need is left out:
  - Position t of a causal stream is a function of tokens 1 … t. Rows with the same prefix have the same vector there,
    so the stream lives on the *nodes of the prefix tree* of the batch, each computed once; backward sums over the
    rows that share a node. 512 rows [eos, a, op, b, =] at p = 223 have 1 + ≈200 + ≈200 + 512 + 512 ≈ 1,430 nodes in
    place of 2,560; no assumption is made about which positions are alike, and a batch without shared prefixes is
    merely as slow as the plain model.
  - The last block needs keys and values of all nodes, and all the rest (queries, W_o, MLP, norms, head) at the B
    leaves alone.

Shapes   B rows · T positions · N nodes · M ≤ N queries · d width · H heads; the stream is (N, d)
Init     nn.Embedding N(0, 1) for tokens and positions; nn.Linear's default (uniform ±1/√fan_in) for W_o, W_1, W_2,
         W_out and the biases of the last three; fused qkv Xavier-uniform, its bias and b_o zero: what
         nn.MultiheadAttention does
Cost     2 threads, batch 512: about 0.4× the time of the plain step; every operation is deterministic on CPU
Source   nanuGPT's tiny_transformer (configuration prime223) for the architecture; the prefix tree is ours
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig

from .mixers.attention import check_heads


class ModularTransformer(nn.Module):
    """tokens (B, block_size) int64 → logits (B, vocab_size) for the answer that follows.

    Of the config count vocab_size, block_size, d_model, n_layer, n_head and d_ff. keller/grokking: 457,578 parameters.
    """

    can_tie = False

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.check(cfg)
        d = cfg.d_model
        self.embed = nn.Embedding(cfg.vocab_size, d)
        self.positions = nn.Parameter(torch.empty(cfg.block_size, d))
        self.blocks = nn.ModuleList(PostNormLayer(d, cfg.n_head, cfg.ff_width) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, cfg.vocab_size)
        self.init_weights()

    @staticmethod
    def check(cfg: ModelConfig) -> None:
        check_heads(cfg)

    @property
    def schedule(self) -> list[int]:
        """Which block is applied, one after another."""
        return list(range(len(self.blocks)))

    def init_weights(self) -> None:
        """Draw all weights from torch's generator, and tag them for the routing of Muon.

        Call it again after `to_empty`: a module that leaves the meta device gets new Parameters, without values and
        without tags.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.normal_(self.positions)
        for block in self.blocks:
            block.init_attention()
        self.embed.weight.muonlm = {"role": "embed"}
        self.positions.muonlm = {"role": "scalar"}  # two-dimensional, but a table: nothing to orthogonalise
        self.head.weight.muonlm = {"role": "head"}

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == len(self.positions), (tokens.shape, len(self.positions))
        token, position, node_path, row_path = prefix_tree(tokens, self.embed.num_embeddings)
        later = torch.arange(tokens.shape[1], device=tokens.device) > position[:, None]  # (N, T), the causal mask
        x = self.embed(token) + F.embedding(position, self.positions)  # (N, d)
        for block in self.blocks[:-1]:
            x = block(x, query=x, path=node_path, later=later)
        x = self.blocks[-1](x, query=F.embedding(row_path[:, -1], x), path=row_path, later=None)  # (B, d)
        return self.head(self.norm(x))


class PostNormLayer(nn.Module):
    """One layer of (2)."""

    def __init__(self, d_model: int, n_head: int, d_ff: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)

    def init_attention(self) -> None:
        d = self.out.in_features
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        self.qkv.weight.muonlm = {"role": "matrix", "split": (0, [d, d, d]), "heads": (0, 3 * self.n_head)}

    def flops_between_tokens(self, length: int) -> float:
        """Of the plain model: 12·T·d for the two products of attention over T tokens."""
        return 12 * length * self.out.in_features

    def forward(self, x: Tensor, *, query: Tensor, path: Tensor, later: Tensor | None) -> Tensor:
        """x (N, d) gives keys and values, query (M, d) goes on: (M, d).

        Query m sees x[path[m, t]] but where later[m, t].
        """
        d = query.shape[1]
        weight_q, weight_kv = self.qkv.weight.split([d, 2 * d])
        bias_q, bias_kv = self.qkv.bias.split([d, 2 * d])
        key, value = F.linear(x, weight_kv, bias_kv).split(d, dim=1)
        # F.embedding is index_select with a fast, deterministic backward; index_add goes row by row on CPUs
        key, value = F.embedding(path, key), F.embedding(path, value)  # (M, T, d)
        seen = attention(F.linear(query, weight_q, bias_q), key, value, self.n_head, later)
        h = self.attention_norm(query + self.out(seen))
        return self.mlp_norm(h + self.down(F.gelu(self.up(h))))


def attention(query: Tensor, key: Tensor, value: Tensor, n_head: int, later: Tensor | None) -> Tensor:
    """One query (M, d) each for its own T keys and values (M, T, d), without those marked in later (M, T). → (M, d)

    Products and sums in place of matmul: M·H matrices of 1 × 32 by 32 × 5 are too small for it (SDPA takes 2.4×, bmm
    4× as long).
    """
    heads = (n_head, key.shape[2] // n_head)
    score = (query.unsqueeze(1) * key).unflatten(2, heads).sum(-1) * heads[1] ** -0.5  # (M, T, H)
    if later is not None:
        score = score.masked_fill(later.unsqueeze(-1), float("-inf"))
    weight = score.softmax(dim=1).unsqueeze(-1)  # (M, T, H, 1)
    return (weight * value.unflatten(2, heads)).sum(1).flatten(1)


@torch.no_grad()
def prefix_tree(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct prefixes of the rows of tokens (B, T), as nodes 0 … N−1, shorter ones first.

    Returns token (N,) and position (N,), the last of each prefix; node_path (N, T), the nodes of its own prefixes, at
    positions up to its own (beyond that, nodes to be masked); row_path (B, T), the nodes of each row, whose leaf is
    row_path[:, -1].
    """
    rows, length = tokens.shape
    row_path = torch.empty_like(tokens)
    parent = torch.zeros_like(tokens[:, 0])  # the prefix so far, numbered within its position
    token, position, sample, nodes = [], [], [], 0
    for t in range(length):
        prefix, parent = torch.unique(parent * vocab_size + tokens[:, t], return_inverse=True)
        row_path[:, t] = parent + nodes
        token.append(prefix % vocab_size)
        position.append(torch.full_like(prefix, t))
        # any row that has the prefix, here mostly the last: all of them agree up to t
        sample.append(torch.empty_like(prefix).scatter_(0, parent, torch.arange(rows, device=tokens.device)))
        nodes += len(prefix)
    return torch.cat(token), torch.cat(position), row_path[torch.cat(sample)], row_path
