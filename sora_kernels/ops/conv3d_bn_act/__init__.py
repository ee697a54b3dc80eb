from .op import conv3d_bn_act

__all__ = ["conv3d_bn_act"]
