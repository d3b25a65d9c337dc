# Everything a person types. Needs Debian 12 (amd64), Go and make; `make prerequisites` installs the rest.
# What is made from third parties is kept below build/ and made again when its inputs change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
export CGO_ENABLED := 0
export PATH := $(PATH):/usr/sbin:/sbin

STEP  := integration/step
BUILD := $(CURDIR)/build
GO    := go
RELEASE := -trimpath -ldflags='-s -w'
TAGS  := vm,node

.PHONY: help
help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | column -t -s @

# --- what the machine needs ---------------------------------------------------

PACKAGES := busybox-static cpio cryptsetup-bin e2fsprogs fio kmod qemu-system-x86 runc xfsprogs xz-utils

.PHONY: prerequisites
prerequisites: build/prerequisites ## install the Debian packages that are missing (as root, or by sudo)

build/prerequisites: integration/prerequisites Makefile
	@$(STEP) 'Debian packages' integration/prerequisites $(PACKAGES)
	@touch $@

build/kernel/vmlinuz: integration/kernel | build/prerequisites
	@$(STEP) 'Debian kernel 6.12' integration/kernel $(BUILD)/kernel
	@touch $@

# --- third-party programs, built from source at the versions of go.mod ---------

TOOLS := build/tools/containerd build/tools/ctr build/tools/containerd-shim-kata-v2 build/tools/crictl

.PHONY: tools
tools: $(TOOLS) ## build containerd, crictl and the stock Kata shim

build/tools/containerd build/tools/ctr: go.mod go.sum
	@$(STEP) '$(@F)' $(GO) build $(RELEASE) -o $@ github.com/containerd/containerd/v2/cmd/$(@F)

build/tools/crictl: integration/crictl/go.mod integration/crictl/go.sum
	@$(STEP) '$(@F)' $(GO) -C integration/crictl build $(RELEASE) -o $(BUILD)/tools/crictl sigs.k8s.io/cri-tools/cmd/crictl

build/tools/containerd-shim-kata-v2: integration/kata-shim go.mod go.sum
	@$(STEP) 'stock Kata shim' integration/kata-shim $@

build/vmrun: $(wildcard integration/vmrun/*.go integration/image/*.go) go.mod | build/prerequisites
	@$(STEP) 'vmrun' $(GO) build $(RELEASE) -o $@ ./integration/vmrun

# --- our programs -------------------------------------------------------------

.PHONY: build
build: ## build the four programs into bin/
	@$(STEP) 'bin/sealvol-nri' $(GO) build $(RELEASE) -o bin/sealvol-nri ./plugin
	@$(STEP) 'bin/containerd-shim-kata-sealvol-v2' $(GO) build $(RELEASE) -o bin/containerd-shim-kata-sealvol-v2 ./shim
	@$(STEP) 'bin/sealvol-guest' $(GO) build $(RELEASE) -o bin/sealvol-guest ./guest
	@$(STEP) 'bin/sealvol' $(GO) build $(RELEASE) -o bin/sealvol ./contrib/sealvol

# --- images -------------------------------------------------------------------

# Other builds of Kata: KATA_AGENT and KATA_KERNEL name files, KATA_MODULES the folder with lib/modules of
# that kernel (without it, the kernel has all built in).
KATA_AGENT   ?= $(BUILD)/guest/kata-agent
KATA_MODULES ?= $(if $(KATA_KERNEL),,$(BUILD)/kernel)

build/mkimage: $(wildcard integration/mkimage/*.go integration/image/*.go) go.mod
	@$(GO) build -o $@ ./integration/mkimage

build/guest/kata-agent: always
	@$(STEP) 'agent of the tests' $(GO) build $(RELEASE) -o $@ ./integration/agent

build/guest/initrd.img: always build build/mkimage build/kernel/vmlinuz $(KATA_AGENT)
	@$(STEP) 'guest image' build/mkimage guest -o $@ -service bin/sealvol-guest -agent '$(KATA_AGENT)' -kernel '$(KATA_MODULES)'

build/images/%.tar: build/mkimage Makefile
	@mkdir -p $(@D)
	@$(STEP) 'container image $*' build/mkimage container -o $@ $($*-image)

busybox-image := -ref local.test/busybox:1 sh
pause-image   := -ref local.test/pause:1 sleep infinity

.PHONY: node-artefacts always
node-artefacts: tools build build/guest/initrd.img build/images/busybox.tar build/images/pause.tar ## build all that a node is made of

# --- tests, from fast to real ---------------------------------------------------

.PHONY: check
check: ## format, vet, staticcheck and unit tests: while editing
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "gofmt: $$unformatted"; exit 1; }
	@$(STEP) 'go vet' $(GO) vet -tags '$(TAGS)' ./...
	@$(STEP) 'staticcheck' $(GO) tool staticcheck -tags '$(TAGS)' ./...
	$(GO) test ./...

.PHONY: test-fuzz
test-fuzz: ## run each fuzz target for a few seconds
	@integration/fuzz 5s

# Tests of what needs root and a real device mapper have the build tag vm and run in a machine of
# their own for each package, with three scratch disks at PCI paths 02/01, 02/02 and 02/03.
VM := $(BUILD)/vmrun -memory 2048 -disk 256M -disk 256M -disk 64M

.PHONY: test-vm
test-vm: build/vmrun build/kernel/vmlinuz ## run the tests that need root and a kernel, each package in a virtual machine
	$(GO) test -count=1 -tags vm ./integration/vmrun
	$(GO) test -count=1 -tags vm -p 1 -exec '$(VM)' $$(grep -rl --include='*_test.go' '^//go:build vm' guest plugin policy shim | xargs -rn1 dirname | sort -u | sed 's|^|./|')

.PHONY: clean
clean: ## remove all that was built
	rm -rf bin build
