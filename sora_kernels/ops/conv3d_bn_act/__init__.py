from .op import conv3d_act, conv3d_bn_act, conv_transpose3d_bn_act

__all__ = ["conv3d_act", "conv3d_bn_act", "conv_transpose3d_bn_act"]
