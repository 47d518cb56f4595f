"""A treatment: the gradient without the mean of each row (Yong et al., Gradient Centralization, ECCV 2020)."""

from wellcond.orthogonality import StepTreatment


class CentralisedGradient(StepTreatment, name="gc", about="centralised gradient"):
    treatment = "centralised gradient"

    def before(self, target, group):
        gradient = target.view.matrix(target.parameter.grad)
        centred = gradient - gradient.mean(-1, keepdim=True)
        target.parameter.grad.copy_(target.view.tensor(centred, target.parameter.shape))
