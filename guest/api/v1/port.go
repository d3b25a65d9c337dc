package sealvolv1

// ControlPort is the vsock port of the guest on which the host reaches Control.
const ControlPort = 1040
