"""depthwise_conv1d on the CPU: the sums of causal_conv1d, which begin ``ahead`` positions later."""

from ..causal_conv1d import cpu as causal

forward, backward = causal.filtered, causal.backward
