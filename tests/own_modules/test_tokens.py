"""Networks of tokens: every linear layer is an integer kernel, what lies between them is float."""

from __future__ import annotations

from pathlib import Path

import torch
from journey import CLASSES, operators_in_float, travel
from torch import Tensor, nn

from mecdeploy import QuantizedModel
from mecdeploy.training.units import WeightedUnit


def linear_layers(model: QuantizedModel) -> set[str]:
    return {name for name, unit in model.units().items() if isinstance(unit, WeightedUnit)}


class MixerBlock(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 8, 2, 2), nn.Sequential(*[MixerBlock(8, 16) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


def test_an_mlp_mixer(tmp_path: Path) -> None:
    model = travel(Mixer(), tmp_path)
    inner = {
        f"blocks.{block}.{part}.{layer}" for block in (0, 1) for part in ("tokens", "channels") for layer in (0, 2)
    }
    assert linear_layers(model) == {"patches", "head", *inner}
    assert {"layer_norm", "gelu", "add"} <= operators_in_float(model)


class VisionTransformer(nn.Module):
    """A class token, learned positions, and one block: MultiheadAttention by hand, or torch's encoder layer."""

    def __init__(self, batch_first: bool, encoder: bool) -> None:
        super().__init__()
        self.batch_first, self.encoder = batch_first, encoder
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        if encoder:
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        else:
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x if self.batch_first else x.transpose(0, 1)
        if self.encoder:
            x = self.layer(x)
        else:
            y = self.norm1(x)
            x = x + self.attention(y, y, y)[0]
            x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0] if self.batch_first else x[0])


def test_multihead_attention_with_tokens_before_images(tmp_path: Path) -> None:
    model = travel(VisionTransformer(batch_first=False, encoder=False), tmp_path)
    attention = {"attention.in_proj", "attention.out_proj"}
    assert linear_layers(model) == {"patches", *attention, "mlp.0", "mlp.2", "head"}
    assert {"softmax", "layer_norm", "gelu", "cat"} <= operators_in_float(model)


def test_an_encoder_layer(tmp_path: Path) -> None:
    model = travel(VisionTransformer(batch_first=True, encoder=True), tmp_path)
    attention = {"layer.self_attn.in_proj", "layer.self_attn.out_proj"}
    assert linear_layers(model) == {"patches", *attention, "layer.linear1", "layer.linear2", "head"}


class SingleHead(nn.Module):
    """Attention without an axis of heads, and a class token that a sum changes before it meets the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1) * 2 + 1, tokens], 1)
        attended = nn.functional.scaled_dot_product_attention(self.query(tokens), self.key(tokens), tokens)
        return self.head((tokens + attended).mean(1))


def test_attention_without_heads(tmp_path: Path) -> None:
    model = travel(SingleHead(), tmp_path)
    assert linear_layers(model) == {"patches", "query", "key", "head"}
    assert "scaled_dot_product_attention" in operators_in_float(model)
