"""What the U-Net is told about a window besides its image: tokens for cross-attention.

Each variate brings one token of its spectrum and one of its statistics, so that there are at least
two keys and the cross-attention has something to choose between (one key makes softmax 1 and leaves
to_q and to_k without gradient). A text encoder adds one token more.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm4ts_kernels.model.config import LDM4TSConfig

LAGS = 5
STATISTICS = 5 + LAGS
MAX_TEXT_TOKENS = 77  # the paper's limit
EMBEDDING_STD = 0.02


def spectrum(
    series: Tensor,  # (B, L, V)
) -> Tensor:
    """Return rfft(hann · x) / √L per variate, real part then imaginary: (B, V, 2 · (L // 2 + 1)).

    LDM4TS (arXiv 2502.14887), section III-C, per variate instead of over the flattened window.
    """
    window = torch.hann_window(series.shape[-2], device=series.device, dtype=series.dtype)
    frequencies = torch.fft.rfft(series.mT * window, norm="ortho")  # (B, V, L // 2 + 1)
    return torch.cat([frequencies.real, frequencies.imag], dim=-1)


def top_lags(
    series: Tensor,  # (B, L, V)
) -> Tensor:
    """Return the five lags of largest autocorrelation, largest first, in rows: (B, V, 5) int64."""
    length = series.shape[-2]
    centred = (series - series.mean(dim=-2, keepdim=True)).mT  # (B, V, L)
    # Padded to 2L, so that the end of the window does not correlate with its start.
    power = torch.fft.rfft(centred, n=2 * length).abs().square()
    autocorrelation = torch.fft.irfft(power, n=2 * length)[..., 1:length]
    return autocorrelation.topk(LAGS, dim=-1).indices + 1


def window_statistics(
    series: Tensor,  # (B, L, V)
) -> Tensor:
    """Return min, max, median, last, trend and the top five lags per variate: (B, V, 10).

    `last` is the last value's distance from the mean, because the model's windows are relative to
    their last value; `trend` is the least-squares slope times the window's length; lags are
    divided by the length.
    """
    length = series.shape[-2]
    time = torch.linspace(-0.5, 0.5, length, device=series.device, dtype=series.dtype)
    slope = torch.einsum("l,blv->bv", time, series) / time.square().sum()
    columns = [
        series.amin(dim=-2),
        series.amax(dim=-2),
        series.median(dim=-2).values,
        series[:, -1] - series.mean(dim=-2),
        slope,
    ]
    lags = top_lags(series).to(series.dtype) / length
    return torch.cat([torch.stack(columns, dim=-1), lags], dim=-1)


class Conditioner(nn.Module):
    """tokens = [W_f spectrum + e_v; W_s statistics + e_v; text], layer-normed: (B, T, width).

    T = 2V, or 2V + 1 with a text encoder; e_v is a learned embedding of the variate.
    """

    def __init__(
        self, history: int, variates: int, width: int, text: "TextConditioner | None" = None
    ):
        super().__init__()
        self.frequency = nn.Linear(2 * (history // 2 + 1), width)
        self.statistics = nn.Linear(STATISTICS, width)
        self.variate = nn.Parameter(EMBEDDING_STD * torch.randn(2, variates, width))
        self.norm = nn.LayerNorm(width)
        self.text = text

    def forward(
        self,
        series: Tensor,  # (B, L, V), normalised
        text: Tensor | None = None,  # (B, 1, E), of `read_text`; None: read now
    ) -> Tensor:  # (B, T, width)
        with torch.autocast(series.device.type, enabled=False):
            spectra, statistics = spectrum(series.float()), window_statistics(series.float())
        tokens = [
            self.frequency(spectra) + self.variate[0],
            self.statistics(statistics) + self.variate[1],
        ]
        if self.text is not None:
            tokens.append(self.text.projection(self.text(statistics) if text is None else text))
        return self.norm(torch.cat(tokens, dim=1))

    def read_text(
        self,
        series: Tensor,  # (B, L, V), normalised
    ) -> Tensor:  # (B, 1, E)
        """Return what the frozen text encoder makes of the windows; there must be one."""
        assert self.text is not None
        return self.text(window_statistics(series.float()))


class TextConditioner(nn.Module):
    """Mean over tokens of a frozen text encoder's output: (B, 1, E). `projection` makes it a token.

    The prompt has the paper's contents: a description of the data, the task, and the window's
    statistics (means over the forecast variates). Writing it copies the statistics to the host, so
    a model with a text encoder does not run under CUDA graphs.
    Raises ValueError when `name` (a hub name or a path) holds no encoder with a tokenizer.
    """

    def __init__(self, name: str, config: LDM4TSConfig):
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        self.config = config
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self.encoder: Any = AutoModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"text_encoder {name!r} cannot be loaded: {error}") from error
        self.encoder.requires_grad_(False)
        self.projection = nn.Linear(self.encoder.config.hidden_size, config.cross_attention_dim)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()  # frozen: no dropout in training either
        return self

    def write_prompts(
        self,
        statistics: Tensor,  # (B, V, 10), of window_statistics
    ) -> list[str]:
        """Return one prompt a window."""
        history, horizons = self.config.history, self.config.horizons
        task = (
            f"Forecast {horizons[0]} to {horizons[-1]} steps ahead from the last {history} steps."
        )
        rows = statistics[:, list(self.config.targets)].mean(dim=1).tolist()
        lags = [", ".join(str(round(lag * history)) for lag in row[5:]) for row in rows]
        return [
            f"{self.config.prompt} {task} Relative to the last value, the minimum is {row[0]:.2f}, "
            f"the maximum {row[1]:.2f} and the median {row[2]:.2f}. "
            f"The trend is {'upward' if row[4] > 0 else 'downward'}. "
            f"The strongest lags are {strongest}."
            for row, strongest in zip(rows, lags, strict=True)
        ]

    def forward(
        self,
        statistics: Tensor,  # (B, V, 10)
    ) -> Tensor:  # (B, 1, E)
        tokens = self.tokenizer(
            self.write_prompts(statistics),
            padding=True,
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
            return_tensors="pt",
        ).to(self.encoder.device)
        with torch.no_grad():
            hidden = self.encoder(**tokens).last_hidden_state  # (B, tokens, hidden)
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return mean.to(statistics.device)
