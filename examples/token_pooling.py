"""Pool the tokens of a vision transformer by their covariance, beside its class token.

So-ViT (Xie et al., 2021) classifies by both: the class token, and the square root of the covariance of the patches'
tokens. The transformer below is PyTorch's own, on the 4 × 4 patches of scikit-learn's digits; with timm's it is the
same two lines: `tokens = vit.forward_features(images)`, and `TokenCovariancePool` of `tokens[:, 1:]`.

    python examples/token_pooling.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from wellcond.nn import TokenCovariancePool


class SmallViT(nn.Module):
    """A transformer on patches of 2 × 2 pixels, which gives logits by class token, by covariance, or by their sum."""

    def __init__(self, heads: str, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.of_class_token = nn.Linear(width, classes) if "class token" in heads else None
        self.pool = TokenCovariancePool(width, reduction=12) if "covariance" in heads else None
        self.of_covariance = nn.Linear(self.pool.out_features, classes) if self.pool else None

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], 1) + self.positions
        tokens = self.blocks(tokens)
        logits = 0.0
        if self.of_class_token is not None:
            logits = logits + self.of_class_token(tokens[:, 0])
        if self.of_covariance is not None:
            logits = logits + self.of_covariance(self.pool(tokens[:, 1:]))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    for heads in ("class token", "covariance", "class token and covariance"):
        torch.manual_seed(0)
        model = SmallViT(heads)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(options.epochs):
            for chosen in torch.randperm(1200).split(64):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            wrong = model(images[1200:]).argmax(1) != labels[1200:]
        print(f"{heads}: test error {100 * wrong.float().mean():.1f} %")


if __name__ == "__main__":
    main()
