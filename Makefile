# Everything a person types. Needs Debian 12 (amd64), Go and make; `make prerequisites` installs the rest.
# What is made from third parties is kept below build/ and made again when its inputs change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.NOTPARALLEL:
export CGO_ENABLED := 0
export PATH := $(PATH):/usr/sbin:/sbin

STEP  := integration/step
BUILD := $(CURDIR)/build
GO    := go
# Without the commit, which would make each program new with each commit.
RELEASE := -trimpath -buildvcs=false -ldflags='-s -w'
TAGS    := vm,mmio,node
SOURCES := contrib guest integration plugin policy shim

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

# --- what the machine needs ---------------------------------------------------

PACKAGES := busybox-static cpio cryptsetup-bin e2fsprogs fio kmod qemu-system-x86 runc xfsprogs xz-utils zstd

.PHONY: prerequisites
prerequisites: build/prerequisites ## install the Debian packages that are missing (as root, or by sudo)

build/prerequisites: integration/prerequisites Makefile
	@$(STEP) 'Debian packages' integration/prerequisites $(PACKAGES)
	@touch $@

build/kernel/vmlinux: integration/kernel | build/prerequisites
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
build: ## build the five programs into bin/
	@$(STEP) 'bin/sealvol-nri' $(GO) build $(RELEASE) -o bin/sealvol-nri ./plugin
	@$(STEP) 'bin/containerd-shim-kata-sealvol-v2' $(GO) build $(RELEASE) -o bin/containerd-shim-kata-sealvol-v2 ./shim
	@$(STEP) 'bin/sealvol-guest' $(GO) build $(RELEASE) -o bin/sealvol-guest ./guest
	@$(STEP) 'bin/sealvol-csi' $(GO) build $(RELEASE) -o bin/sealvol-csi ./contrib/csi
	@$(STEP) 'bin/sealvol' $(GO) build $(RELEASE) -o bin/sealvol ./contrib/sealvol

build/testbed: always
	@$(STEP) 'build/testbed' $(GO) build $(RELEASE) -o $@ ./guest/testbed

build/kubelet: always
	@$(STEP) 'build/kubelet' $(GO) build $(RELEASE) -o $@ ./integration/kubelet

# --- images -------------------------------------------------------------------

# Other builds of Kata: KATA_AGENT and KATA_KERNEL name files, KATA_MODULES the folder with lib/modules of
# that kernel (without it, the kernel has all built in).
KATA_AGENT   ?= $(BUILD)/guest/kata-agent
KATA_MODULES ?= $(if $(KATA_KERNEL),,$(BUILD)/kernel)

build/mkimage: $(wildcard integration/mkimage/*.go integration/image/*.go) go.mod
	@$(GO) build $(RELEASE) -o $@ ./integration/mkimage

$(BUILD)/guest/kata-agent: always
	@$(STEP) 'agent of the tests' $(GO) build $(RELEASE) -o $@ ./integration/agent

build/guest/initrd.img: always build build/mkimage build/kernel/vmlinux $(KATA_AGENT)
	@$(STEP) 'guest image' build/mkimage guest -o $@ -service bin/sealvol-guest -agent '$(KATA_AGENT)' -kernel '$(KATA_MODULES)'

build/images/programs/%: integration/%/main.go go.mod
	@$(GO) build $(RELEASE) -o $@ ./integration/$*

.PRECIOUS: build/images/programs/%
build/images/%.tar: build/mkimage build/images/programs/pause build/images/programs/vsockdial Makefile
	@mkdir -p $(@D)
	@$(STEP) 'container image $*' build/mkimage container -o $@ $($*-image)

busybox-image := -ref local.test/busybox:1 -file /bin/vsockdial=build/images/programs/vsockdial sh
pause-image   := -ref local.test/pause:1 -file /pause=build/images/programs/pause /pause

.PHONY: node-artefacts always
node-artefacts: tools build build/kubelet build/guest/initrd.img build/images/busybox.tar build/images/pause.tar ## build all that a node is made of

# --- tests, from fast to real ---------------------------------------------------

# A node has one processor and takes longest, so the rest runs beside it, when all that they share is there.
.PHONY: test
test: check build/vmrun build/testbed node-artefacts ## run every test
	@integration/abreast 'node $(MAKE) test-node' 'else $(MAKE) test-fuzz test-vm test-attack'

.PHONY: check
check: build/prerequisites ## format, vet, staticcheck and unit tests: while editing
	@bad=$$(gofmt -l $(SOURCES)); [ -z "$$bad" ] || { echo "not formatted by gofmt: $$bad"; exit 1; }
	@! grep -rnE --include='*_test.go' '\b[tbf]\.Skip' $(SOURCES) || { echo 'a test that cannot run fails, and says why'; exit 1; }
	@$(STEP) 'go vet' $(GO) vet -tags $(TAGS) ./...
	@$(STEP) 'staticcheck' $(GO) tool staticcheck -tags $(TAGS) ./...
	$(GO) test ./...

.PHONY: test-fuzz
test-fuzz: ## run each fuzz target a few seconds long
	@integration/fuzz 10000 $(SOURCES)

# Tests that need root and a kernel have the build tag vm and run in a virtual machine, one for each package,
# with scratch disks at Kata's PCI paths 02/01, 02/02 and 02/03, behind a root port and on virtio-scsi. A disk on virtio-mmio needs a machine
# of another kind. An emulated machine with two processors dies now and then of its own (the kernel patches code that the other processor
# runs); its command then starts again in another one.
VM := $(BUILD)/vmrun -tries 3 -disk 256M -disk 256M -disk 64M -disk 64M@port -disk 64M@scsi

.PHONY: test-vm
test-vm: build/vmrun build/kernel/vmlinux ## run the tests that need root and a kernel, in virtual machines
	$(GO) test -count=1 -tags vm ./integration/vmrun
	$(GO) test -count=1 -tags vm -p 1 -exec '$(VM)' $$(grep -rl --include='*_test.go' '^//go:build vm$$' $(SOURCES) | \
		xargs dirname | sort -u | grep -vE 'integration/(vmrun|attack)' | sed 's|^|./|')
	$(GO) test -count=1 -tags vm,mmio -run '^TestMMIO' -exec '$(BUILD)/vmrun -tries 3 -disk 64M@mmio' ./guest/internal/volume

# The host against sealed volumes: disks to attack, one larger than the machine's memory, one to swap to, and sixty-four small ones. The limit
# is vmrun's: the clock of an emulated machine that is short of processors runs fast.
ATTACKED := -tries 3 -memory 1024 $(addprefix -disk=,64M 64M 64M 3G 128M $(foreach i,$(shell seq 64),8M))

.PHONY: test-attack
test-attack: build/vmrun build/testbed build/kernel/vmlinux ## attack sealed volumes, in a virtual machine; RUN=name for some attacks, KINDS=all for every suite and file system
	SEALVOL_ATTACK='$(KINDS)' $(GO) test -count=1 -v -timeout 0 -tags vm -exec '$(BUILD)/vmrun $(ATTACKED)' $(if $(RUN),-run '$(RUN)') ./integration/attack

# A node: a machine that can run virtual machines. One processor, and another machine if it dies: nested
# virtualisation in an emulator has faults of its own. KINDS=all takes hours.
NODE := $(BUILD)/vmrun -nested -cpus 1 -tries 3 -memory 6144 -timeout $(if $(KINDS),6h,60m)
NODETEST = SEALVOL_NODE='$(KINDS)' $(GO) test -count=1 -v -tags node -timeout $(if $(KINDS),0,59m) -exec '$(NODE)' ./integration/node

.PHONY: test-node
test-node: build/vmrun node-artefacts ## run the tests on nodes of real containerd, Kata and QEMU; RUN=name for some, KINDS=all for every fault, a hundred pods and disks that stall
ifdef RUN
	$(NODETEST) -run '$(RUN)'
else
	$(NODETEST) -run '^TestKilling'
	$(NODETEST) -skip '^TestKilling$(if $(KINDS),,|^TestADiskThatStalls)'
endif

# --- on a node, to look at --------------------------------------------------------

.PHONY: demo
demo: build/vmrun node-artefacts ## play the talk's session
	@$(GO) build $(RELEASE) -o build/demo ./integration/demo
	@$(NODE) build/demo $(CURDIR)

# Guests that write down what they are asked. The policy tool's tests have it as data.
TESTDATA := $(CURDIR)/policy/author/testdata

build/record/record: always
	@$(STEP) 'build/record/record' $(GO) build $(RELEASE) -o $@ ./integration/record

build/record/agent: always
	@$(STEP) 'build/record/agent' $(GO) build $(RELEASE) -o $@ ./integration/record/agent

build/record/initrd.img: always build/mkimage build/kernel/vmlinux build/record/agent
	@$(STEP) 'image of recording guests' build/mkimage guest -o $@ -service build/record/agent -agent build/record/agent -kernel '$(KATA_MODULES)'

.PHONY: record
record: build/vmrun node-artefacts build/record/record build/record/initrd.img ## record what reaches the guest for the manifests of the policy tool, in 25 minutes; NAMES= for some
	@KATA_INITRD=$(BUILD)/record/initrd.img $(NODE) -timeout 60m -share $(TESTDATA)/recorded build/record/record $(CURDIR) $(TESTDATA)/manifests $(TESTDATA)/recorded $(NAMES)

.PHONY: bench
bench: bench-node bench-sealing bench-policy bench-csi ## measure, into build/bench.json
	@build/bench/bench merge build/bench.json build/bench/node.json build/bench/sealing.json build/bench/policy.json build/bench/csi.json

.PHONY: bench-node
bench-node: build/vmrun node-artefacts build/bench/bench ## measure a node
	@$(STEP) 'the gate, per call' $(SHELL) -c "$(GO) test -run '^$$' -bench BenchmarkRPC -count 5 ./guest/internal/gate > build/bench/gate.txt"
	@$(NODE) -share $(BUILD)/bench build/bench/bench node $(CURDIR) $(BUILD)/bench/gate.txt $(BUILD)/bench/node.json

# 1, 10 and 100 GiB, of which the host stores what is written: some 2 GiB.
.PHONY: bench-sealing
bench-sealing: build/vmrun build/kernel/vmlinux build/bench/bench build/testbed ## compare sealed volumes with CDH's, dm-crypt and the bare disk
	@$(BUILD)/vmrun -memory 6144 -timeout 30m -disk 1G -disk 10G -disk 100G -share $(BUILD)/bench \
		build/bench/bench sealing build/testbed $(BUILD)/bench/sealing.json

.PHONY: bench-policy
bench-policy: build/bench/bench ## measure SetPolicy and decisions at 1, 10 and 100 volumes, and the evaluator's memory
	@build/bench/bench policy $(BUILD)/bench/policy.json

.PHONY: bench-csi
bench-csi: build/bench/bench ## measure the CSI driver's calls
	@$(STEP) 'CSI, per call' $(SHELL) -c "$(GO) test -run '^$$' -bench BenchmarkCSI -count 5 ./contrib/csi > build/bench/csi.txt"
	@build/bench/bench csi $(BUILD)/bench/csi.txt $(BUILD)/bench/csi.json

build/bench/bench: always
	@$(GO) build $(RELEASE) -o $@ ./integration/bench

.PHONY: clean
clean: ## remove all that was built
	rm -rf bin build
