"""CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 photographs, 3×32×32, of 10 classes."""

HUB = "uoft-cs/cifar10"
