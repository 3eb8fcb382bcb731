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


class Resnet(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                                                 # (B, c_in, h, w)
        y = self.conv1(F.silu(self.norm1(x)))                                             # (B, c_out, h, w)
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """Self-attention over all positions of a feature map, with one head."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):                                                                 # (B, c, h, w)
        y = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))      # (B, 1, h*w, c)
        return x + rearrange(self.to_out(y), "b 1 (h w) c -> b c h w", h=x.shape[2])


def downsample(channels):
    """(B, c, h, w) -> (B, c, h/2, w/2). Only the right and the bottom are padded, as in training."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels):
    """(B, c, h, w) -> (B, c, 2h, 2w)"""
    repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(repeat=repeat, conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Stage(nn.Module):
    """Resnets at one resolution, then perhaps a step to half or twice that resolution."""

    def __init__(self, c_in, c_out, resnets, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.Sequential(*(Resnet(c_out if k else c_in, c_out, groups) for k in range(resnets)))
        self.downsamplers = nn.Sequential(*([downsample(c_out)] if down else []))         # []: identity
        self.upsamplers = nn.Sequential(*([upsample(c_out)] if up else []))

    def forward(self, x):
        return self.upsamplers(self.downsamplers(self.resnets(x)))


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.Sequential(PixelAttention(channels, groups))
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


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
        x = self.mid_block(self.down_blocks(self.conv_in(x)))                             # (B, c, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                               # (B, 2 * 4, h, w)


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
        x = self.up_blocks(self.mid_block(self.conv_in(z)))                               # (B, c, 8h, 8w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                               # (B, 3, 8h, 8w)


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
