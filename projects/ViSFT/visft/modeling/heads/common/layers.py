"""Layers of the DETR and Mask2Former transformers."""

from torch import Tensor, nn
from torch.nn import functional as F

from visft.errors import ConfigError


class Attention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, which takes one mask for all heads without copying it for each."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        check_divisible("attention width", dim, num_heads, "the number of heads")
        super().__init__(dim, num_heads, dropout, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """[N, Lq, D], [N, Lk, D], [N, Lk, D] -> [N, Lq, D].

        Args:
            allowed: bool, broadcastable to [N, 1, Lq, Lk], True where a query may attend to a key.
        """
        dim = self.embed_dim
        if query is key:
            q, k = F.linear(query, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim]).chunk(2, -1)
        else:
            q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            k = F.linear(key, self.in_proj_weight[dim : 2 * dim], self.in_proj_bias[dim : 2 * dim])
        v = F.linear(value, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights in every matrix below `module`."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def check_divisible(what: str, value: int, divisor: int, divisor_name: str) -> None:
    """Raise ConfigError unless `divisor` divides `value`, both positive."""
    if value < 1 or divisor < 1 or value % divisor:
        raise ConfigError(f"{what} is {value}: it must be a multiple of {divisor} ({divisor_name})")
