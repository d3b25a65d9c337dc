package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// KVM's ioctls, from linux/kvm.h.
const (
	kvmCreateVM      = 0xae01
	kvmCreateIRQChip = 0xae60
	kvmCreateVCPU    = 0xae41
)

// holdKVM makes a virtual machine that never runs and lasts as long as this
// process. KVM patches its own code when the first processor whose APIC is off
// comes and when the last one goes, which is at each start and end of a
// machine; and emulated processors, each with its own cache of translated
// code, do not always survive that (about one run of four ended in a panic in
// apic_has_pending_timer). With one such processor always there, nothing is patched.
func holdKVM() error {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/kvm: %w", err)
	}
	defer unix.Close(kvm)
	vm, err := kvmIoctl(kvm, kvmCreateVM)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	if _, err := kvmIoctl(vm, kvmCreateIRQChip); err != nil {
		return fmt.Errorf("KVM_CREATE_IRQCHIP: %w", err)
	}
	if _, err := kvmIoctl(vm, kvmCreateVCPU); err != nil {
		return fmt.Errorf("KVM_CREATE_VCPU: %w", err)
	}
	return nil
}

// kvmIoctl makes a call whose argument is 0. Many give a file descriptor.
func kvmIoctl(fd int, request uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
