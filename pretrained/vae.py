"""The autoencoder of SDXL, whose latents OmniGen works on. Modules have the names of the released file.

B batch, c channels, h, w height and width of the feature map at hand (Encoder, Decoder, VAE: of the latent).
"""
import reprlib
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common.files import InputError, read_json
from pretrained.weights import check_numbers, load_weights, released


BAND = 2**23                              # numbers of a feature map that are computed at once, about


def in_bands(conv, x, prepare, repeat=1, in_place=False):
    """A 3 x 3 convolution of prepare(x), x (B, c, h, w), computed in bands of rows -> (B, c_out, repeat * h,
    repeat * w). prepare works on each number alone, or repeats it in both directions.

    So what it makes never exists whole: at 1024 x 1024 pixels that is a gigabyte. in_place: nor does the
    result, which takes the place of x."""
    B, c, h, w = x.shape
    rows = max(1, BAND // (B * c * w * repeat**2))
    out = x if in_place else x.new_empty(B, conv.out_channels, repeat * h, repeat * w)
    above = x[:, :, :0]                                    # the row above a band, as it was
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        below = x[:, :, bottom:bottom + 1]
        y = prepare(torch.cat([above, x[:, :, top:bottom], below], dim=2))
        ends = above.shape[2], below.shape[2]              # of each, once repeated, one row is needed
        y = y[:, :, (repeat - 1) * ends[0]:y.shape[2] - (repeat - 1) * ends[1]]
        y = F.pad(y, (1, 1, 1 - ends[0], 1 - ends[1]))     # at the edge of the image there are zeros
        above = x[:, :, bottom - 1:bottom].clone()
        out[:, :, repeat * top:repeat * bottom] = F.conv2d(y, conv.weight, conv.bias)
    return out


def norm_silu_conv(norm, conv, x, in_place=False):
    """conv(silu(norm(x))) for a GroupNorm."""
    B, c = x.shape[:2]
    variance, mean = torch.var_mean(x.view(B, norm.num_groups, -1), dim=2, correction=0)  # (B, groups)
    scale = (variance + norm.eps).rsqrt().repeat_interleave(c // norm.num_groups, 1) * norm.weight    # (B, c)
    shift = norm.bias - mean.repeat_interleave(c // norm.num_groups, 1) * scale                       # (B, c)
    return in_bands(conv, x, lambda rows: F.silu(rows * scale[:, :, None, None] + shift[:, :, None, None]),
                    in_place=in_place)


class Resnet(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                                                 # (B, c_in, h, w)
        y = norm_silu_conv(self.norm1, self.conv1, x)                                     # (B, c_out, h, w)
        y = norm_silu_conv(self.norm2, self.conv2, y, in_place=True)
        for own, rows in zip(y.chunk(8, dim=2), x.chunk(8, dim=2)):        # in bands, for the same reason
            own += self.conv_shortcut(rows)
        return y


class PixelAttention(nn.Module):
    """Self-attention over all positions of a feature map, with one head."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):                                                                 # (B, c, h, w)
        y = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)                              # (B, 1, h*w, c) each
        # some queries at a time: not every kernel for heads this wide does without the whole matrix
        y = torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(2048, dim=2)], dim=2)
        return x + rearrange(self.to_out(y), "b 1 (h w) c -> b c h w", h=x.shape[2])


def downsample(channels):
    """(B, c, h, w) -> (B, c, h/2, w/2). Only the right and the bottom are padded, as in training."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, 2h, 2w)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return in_bands(self.conv, x, lambda rows: F.interpolate(rows, scale_factor=2.0), repeat=2)


class Stage(nn.Module):
    """Resnets at one resolution, then perhaps a step to half or twice that resolution.

    Encoder and Decoder run its layers themselves: a `forward` would keep its input until its end."""

    def __init__(self, c_in, c_out, resnets, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.Sequential(*(Resnet(c_out if k else c_in, c_out, groups) for k in range(resnets)))
        self.downsamplers = nn.Sequential(*([downsample(c_out)] if down else []))         # []: identity
        self.upsamplers = nn.Sequential(*([Upsample(c_out)] if up else []))

    def layers(self):
        return [*self.resnets, *self.downsamplers, *self.upsamplers]


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.Sequential(PixelAttention(channels, groups))
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))

    def layers(self):
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class Encoder(nn.Module):
    def __init__(self, channels, groups, latent):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.Sequential()
        for k, (c_in, c_out) in enumerate(pairwise([channels[0], *channels]), 1):
            self.down_blocks.append(Stage(c_in, c_out, 2, groups, down=k < len(channels)))
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)

    def forward(self, x):                                                                 # (B, 3, 8h, 8w)
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block):
            for layer in stage.layers():
                x = layer(x)                                                              # to (B, c, h, w)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)                       # (B, 2 * 4, h, w)


class Decoder(nn.Module):
    def __init__(self, channels, groups, latent):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups)
        self.up_blocks = nn.Sequential()
        for k, (c_in, c_out) in enumerate(pairwise([channels[0], *channels]), 1):
            self.up_blocks.append(Stage(c_in, c_out, 3, groups, up=k < len(channels)))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):                                                                 # (B, 4, h, w)
        x = self.conv_in(z)
        for stage in (self.mid_block, *self.up_blocks):
            for layer in stage.layers():
                x = layer(x)                                                              # to (B, c, 8h, 8w)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)                       # (B, 3, 8h, 8w)


class VAE(nn.Module):
    """The autoencoder of SDXL (AutoencoderKL): 8 x 8 pixels become one position of a latent with 4 channels.

    Latents, here and in every file, are scaled to about unit variance."""

    def __init__(self, channels=(128, 256, 512, 512), groups=32, latent=4, scale=0.13025):
        super().__init__()
        self.scale = scale
        self.encoder = Encoder(channels, groups, latent)
        self.decoder = Decoder(channels, groups, latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @torch.no_grad()
    def encode(self, image):
        """image (B, 3, 8h, 8w) in [-1, 1] -> mean and standard deviation of its latent, each (B, 4, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)               # (B, 4, h, w) each
        return mean * self.scale, (0.5 * logvar.clamp(-30, 20)).exp() * self.scale

    @torch.no_grad()
    def decode(self, latent):
        """latent (B, 4, h, w) -> image (B, 3, 8h, 8w), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent / self.scale))


FIXED = {"_class_name": "AutoencoderKL", "layers_per_block": 2, "act_fn": "silu", "in_channels": 3,
         "out_channels": 3, "latent_channels": 4, "latents_mean": None, "latents_std": None,
         "shift_factor": None}


def load_vae(folder, device="cpu"):
    """VAE in float32 from folder/config.json and folder/diffusion_pytorch_model.safetensors."""
    path = Path(folder) / "config.json"
    found = read_json(released(path))
    for key, value in FIXED.items():
        if found.get(key, value) != value:
            raise InputError(f"{path}: {key} is {reprlib.repr(found[key])}, not {value!r}: not the "
                             f"autoencoder of SDXL")
    check_numbers(path, found, ["norm_num_groups"], ["scaling_factor"])
    groups = found["norm_num_groups"]
    channels = found.get("block_out_channels")
    if not (isinstance(channels, list) and len(channels) == 4
            and all(type(c) is int and 0 < c < 2**14 and c % groups == 0 for c in channels)):
        raise InputError(f"{path}: block_out_channels is {reprlib.repr(channels)}; four multiples of "
                         f"norm_num_groups, {groups}, are expected")
    with torch.device("meta"):
        vae = VAE(channels, groups, scale=found["scaling_factor"])
    weights = path.with_name("diffusion_pytorch_model.safetensors")
    return load_weights(vae, weights, torch.float32, device).eval()
