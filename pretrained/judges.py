"""CLIP and DINO as judges of an edited photograph: the paper's adherence and faithfulness (Sec. 6.1)."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from pretrained.encoders import (CLIP, ClipTokenizer, ViT, clip_pixels, dino_pixels, direction,
                                 direction_pixels, load_clip, load_dino)


class Judges(NamedTuple):
    clip: CLIP
    tokenizer: ClipTokenizer
    dino: ViT
    device: torch.device

    def see(self, image):
        """Features (D,) of an Image by each encoder; "direct": CLIP's for CLIP-Dir."""
        def features(model, pixels):
            return model.image_features(pixels[None].to(self.device))[0].float().cpu()
        return {"clip": features(self.clip, clip_pixels(image, self.clip.size)),
                "dino": features(self.dino, dino_pixels(image)),
                "direct": features(self.clip, direction_pixels(image, self.clip.size))}

    def read(self, caption):
        """CLIP's features (D,) of a text, and whether it was cut."""
        ids, too_long = self.tokenizer([caption])
        return self.clip.text_features(ids.to(self.device))[0].float().cpu(), too_long


def load_judges(clip, dino, device):
    return Judges(*load_clip(clip, device), load_dino(dino, device), device)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


def photo_scores(judges, source, output, source_caption, target_caption):
    """Scores of an output (h, w, 3) uint8 -> dino, its likeness to the source, if there is one; and clip_dir,
    the change from caption to caption. Where that is undefined, without a source or with captions that are
    alike or missing, clip_t instead: the likeness to the target's caption."""
    after = judges.see(Image.fromarray(output))
    target, _ = judges.read(target_caption)
    scores = {}
    if source is not None:
        before = judges.see(Image.fromarray(source))
        scores["dino"] = cosine(after["dino"], before["dino"])
        if source_caption:
            change = direction(before["direct"], after["direct"], judges.read(source_caption)[0], target)
            if not change.isnan():
                return {**scores, "clip_dir": change.item()}
    return {**scores, "clip_t": cosine(after["clip"], target)}
