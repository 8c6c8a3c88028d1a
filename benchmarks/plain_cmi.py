"""CMI as a plain loop: the opponent in ``race.py``.

It does what the code that was released with the paper does (Fang et al., IJCAI 2021, arXiv 2105.08584), with the maths and settings of
our :class:`~fedimpr.synthesis.ContrastiveModelInversion`:

* Global and local views pass through the teacher one after another.
* Two forward hooks stand on every batch-norm layer for good: one recomputes mean and variance, after a permuted copy, and their distance to
  the running ones; the other recomputes the spatial mean. Both also work where nobody asks: in the local pass, and in the passes of
  distillation.
* The host reads the loss after every step, to know which images are the best.
* The memory of features stands on the CPU, negatives are drawn by Python, gathered there and moved to the device in every step.
* Finished images are written to PNG files, one by one. A DataLoader opens them one by one and cuts and flips them as PIL images.
* The weights of teacher and student keep ``requires_grad``, so that mining computes their gradients, too, unless ``frozen`` is set.
* Weights are contiguous, and everything is float32, unless the caller has put an autocast around the call.

What is kinder to it than the released code: mining draws its views with our batched :class:`~fedimpr.views.Views`; the student's optimiser
is ours; running accuracy and loss of the student are not kept; a DataLoader has no worker processes on a CPU, where both sides have one
thread, and the released four beside a GPU.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from pairs import CROPS
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedimpr import seeds
from fedimpr._torchvision import torchvision
from fedimpr.distillation import Distillation, soft_divergence
from fedimpr.synthesis import ContrastiveModelInversion
from fedimpr.synthesis.generator import Generator, ProjectionHead


class GapHook:
    """Recomputes a layer's statistics in every pass, and how far they are from the running ones."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.hook = layer.register_forward_hook(self.look)

    def look(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0].float()
        mean = x.mean((0, 2, 3))
        variance = x.permute(1, 0, 2, 3).contiguous().flatten(1).var(1, unbiased=False)
        self.gap = (layer.running_mean - mean).norm() + (layer.running_var - variance).norm()


class MeanHook:
    """Recomputes the instance features of a layer in every pass."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.hook = layer.register_forward_hook(self.look)

    def look(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        self.mean = inputs[0].float().mean((2, 3))


class PlainCMI:
    """One teacher's miner and distiller.

    Args:
        teacher: in eval mode; its hooks stay until :meth:`close`.
        settings: of our synthesizer; its latents, weights, steps and views are taken over.
        memory: (B, 2, F) local and global features to start from.
        folder: of the PNG files.
        generator: the source of what is drawn in mining but the negatives.
        frozen: whether mining leaves the weights of teacher and student out of its backward pass.
    """

    def __init__(
        self,
        teacher: nn.Module,
        settings: ContrastiveModelInversion,
        memory: Tensor,
        folder: Path,
        generator: torch.Generator,
        frozen: bool,
    ) -> None:
        layers = [layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
        self.teacher, self.settings, self.folder = teacher.requires_grad_(not frozen), settings, folder
        self.frozen = frozen
        self.gaps, self.means = [GapHook(layer) for layer in layers], [MeanHook(layer) for layer in layers]
        self.device = next(teacher.parameters()).device
        self.memory, self.place, self.written = memory.flatten(1).cpu().clone(), 0, 0
        self.generator, self.random = generator, seeds.on_device(generator, self.device)

    def close(self) -> None:
        for hook in (*self.gaps, *self.means):
            hook.hook.remove()

    def features(self) -> Tensor:
        return torch.cat([hook.mean for hook in self.means], 1)

    def mine(self, student: nn.Module, classes: int, shape: tuple[int, int, int]) -> list[float]:
        """Mine one batch and write it; the loss of every step. Draws what our synthesizer draws, in its order."""
        s, n, device = self.settings, self.settings.batch_size, self.device
        student.eval().requires_grad_(not self.frozen)
        labels = torch.randint(classes, (n,), generator=self.generator).to(device)
        with seeds.isolated(seeds.draw_seed(self.generator)):
            network = Generator(s.latent, s.width, shape).to(device)
        latents = torch.randn(n, s.latent, generator=self.random, device=device).requires_grad_()
        adam = torch.optim.Adam([latents, *network.parameters()], lr=s.lr, betas=(0.5, 0.999))
        with seeds.isolated(seeds.draw_seed(self.generator)):
            head = ProjectionHead(self.memory.shape[1] // 2, s.hidden, s.projection).to(device)
        of_head = torch.optim.Adam(head.parameters(), lr=s.lr)
        losses: list[float] = []
        for _ in range(s.steps):
            images = network(latents)
            global_view, local_view = s.global_view(images, self.random), s.local_view(images, self.random)
            logits = self.teacher(global_view)
            gap = sum(hook.gap for hook in self.gaps)
            certain = F.cross_entropy(logits, labels)
            answers = student(global_view)
            agree = (answers.argmax(1) == logits.argmax(1)).float()
            divergence = F.kl_div(answers.log_softmax(1), logits.softmax(1), reduction="none").sum(1)
            loss = s.priors.batch_norm * gap + s.priors.target * certain - s.priors.adversarial * (divergence * agree).mean()
            global_ = self.features()
            self.teacher(local_view)
            local = self.features()
            drawn = random.sample(list(range(len(self.memory))), min(s.negatives, len(self.memory)))
            banked_local, banked_global = self.memory[drawn].to(device).chunk(2, 1)
            mine, theirs = head(torch.cat([local, banked_local, global_, banked_global])).chunk(2)
            cosines = mine @ theirs.detach().T / s.contrast_temperature
            contrast = F.cross_entropy(cosines, torch.arange(len(cosines), device=device), reduction="none")
            loss = loss + s.contrastive_weight * (contrast[:n].mean() + contrast[n:].mean())
            losses.append(loss.item())
            if losses[-1] <= min(losses):
                best, features = images.detach(), torch.cat([local, global_], 1).detach()
            adam.zero_grad()
            of_head.zero_grad()
            loss.backward()
            adam.step()
            of_head.step()
        self.memory[torch.arange(self.place, self.place + n) % len(self.memory)] = features.cpu()
        self.place += n
        self.write(best)
        return losses

    def write(self, images: Tensor) -> None:
        """A PNG file for each of (N, 3, H, W) images in [0, 1]."""
        for image in (images * 255).round().byte().cpu().numpy():
            pixels = image.transpose(1, 2, 0)
            Image.fromarray(pixels).save(self.folder / f"{self.written}.png")
            self.written += 1

    def distil(self, student: nn.Module, settings: Distillation, temperature: float) -> None:
        """Train the student on the files, which are CIFAR's size."""
        assert settings.views == CROPS, "the transforms below are made for these views"
        transforms = torchvision().transforms
        cut = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        files = Files(self.folder, transforms.Compose(cut))
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(files, settings.batch_size, shuffle=True, num_workers=4 if on_gpu else 0, pin_memory=on_gpu)
        optimiser = settings.optimiser_of(list(student.parameters()))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
        student.train().requires_grad_()
        batches = iter(loader)
        for _ in range(settings.steps):
            images = next(batches, None)
            if images is None:
                batches = iter(loader)
                images = next(batches)
            images = images.to(self.device, non_blocking=True)
            with torch.no_grad():
                wanted = self.teacher(images)
            loss = soft_divergence(student(images), wanted, temperature)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cosine.step()


class Files(Dataset):
    """The PNG files of a folder."""

    def __init__(self, folder: Path, transform: object) -> None:
        self.paths, self.transform = sorted(folder.glob("*.png")), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Tensor:
        return self.transform(Image.open(self.paths[place]))
