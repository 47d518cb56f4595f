"""Speed, memory and accuracy of every solver and layer, against autograd, published iterations and other packages."""
