# SPDX-License-Identifier: GPL-2.0-or-later
# All but install happens in the checkout, in .venv; the only things installed elsewhere are the Debian packages that
# are missing, and those only by root. PYTHON=... takes another Python, ARGS=... goes to what a target runs.

PYTHON ?= python3
VENV := .venv
APT_INSTALL := apt-get install --no-install-recommends
# Where install puts things; all but PREFIX and DESTDIR follow from the machine.
PREFIX ?= /usr/local
DESTDIR ?=
# The Python that installed programs run on. Not one from PATH: units can't see a Python in a home directory.
RUN_PYTHON ?= $(if $(filter file,$(origin PYTHON)),/usr/bin/python3,$(PYTHON))
BUILD ?= build
BENCH_PROGRAMS := build/bench/client build/bench/floor
TEST_GUESTS := $(patsubst %.S,%.bin,$(wildcard tests/guests/*.S))
LINUX_PROGRAMS := $(patsubst tests/linux/guest/%.c,build/linux-guest/%,$(wildcard tests/linux/guest/*.c))

MAKEFLAGS += --no-builtin-rules
SHELL := /bin/sh
.SHELLFLAGS := -ec
.ONESHELL:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench mutants guest qemu linux-guest clean install uninstall deb

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while read -r target text; do
		printf '  make %-11s  %s\n' "$$target" "$$text"
	done

demo: $(VENV)/demo.stamp guest  ## interrupts from remoted into a KVM guest and back, counted (ARGS="--rounds 100")
	@exec $(VENV)/bin/iohubctl demo $(ARGS)

test: $(VENV)/test.stamp guest  ## all tests (ARGS="-n 0 -k config")
	@exec $(VENV)/bin/pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/test.stamp  ## ruff (rules and format) and mypy
	@status=0
	$(VENV)/bin/ruff check || status=1
	$(VENV)/bin/ruff format --check || status=1
	$(VENV)/bin/mypy || status=1
	exit $$status

bench: $(VENV)/test.stamp guest $(BENCH_PROGRAMS)  ## remoted beside QEMU's remote process (ARGS="--rounds 1 exchanges")
	@exec $(VENV)/bin/python -m tests.bench.bench $(ARGS)

mutants: $(VENV)/test.stamp guest  ## faults put into the code, and which the tests don't notice (ARGS="-k iohub")
	@exec $(VENV)/bin/python -m tests.mutants $(ARGS)

guest: $(TEST_GUESTS)  ## the guests of the embedded VM and of the tests
	@$(MAKE) --silent --no-print-directory -C proxyd/vm/embedded/guest

qemu:  ## fetches a QEMU that has vfio-user-pci, where the system's has none, into build/qemu
	@if qemu-system-x86_64 -device vfio-user-pci,help 2>/dev/null | grep -q .; then
		qemu=qemu-system-x86_64
	else
		$(MAKE) --silent --no-print-directory build/qemu
		qemu=build/qemu/qemu-system-x86_64
	fi
	echo "$$qemu is $$($$qemu --version | head -n 1)"

linux-guest: build/linux-guest/initramfs  ## fetches a Linux kernel and makes an initramfs, in build/linux-guest
	@echo "build/linux-guest has $$(basename build/linux-guest/packages/boot/vmlinuz-*)"

install: $(VENV)/install.stamp guest  ## programs, units, man pages below PREFIX=/usr/local (DESTDIR=stage PREFIX=/usr)
	@exec env VENV='$(VENV)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' RUN_PYTHON='$(RUN_PYTHON)' systemd/install

uninstall:  ## removes what install with the same DESTDIR and PREFIX has put there
	@exec env PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' systemd/uninstall

deb: $(VENV)/install.stamp  ## a Debian package, in BUILD=build/deb
	@for tool in dpkg-buildpackage dh; do
		command -v $$tool >/dev/null || { echo "make: $$tool is missing; as root: $(APT_INSTALL) debhelper" >&2; exit 1; }
	done
	rm -rf $(BUILD)/deb
	source=$(BUILD)/deb/iohub
	mkdir -p $$source
	cp -r common proxyd remoted systemd qemu_iohub.py pyproject.toml README.md LICENSE $$source
	mv $$source/systemd/debian $$source/debian
	$(VENV)/bin/python -m pip wheel --quiet --no-input --no-cache-dir --disable-pip-version-check \
		--wheel-dir $$source/wheels "setuptools>=77" $(abspath $(BUILD))/deb/iohub
	cd $$source
	VENV=$(abspath $(VENV)) dpkg-buildpackage --no-sign --build=binary

clean:  ## back to what git has: removes .venv, the guests, what was fetched, and all caches
	@rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache $(TEST_GUESTS)
	find common proxyd remoted tests -name __pycache__ -prune -exec rm -rf {} +
	$(MAKE) --silent --no-print-directory -C proxyd/vm/embedded/guest clean

build/bench/%: tests/bench/%.c
	@mkdir -p $(@D)
	gcc -O2 -Wall -Wextra -o $@ $<

# What is fetched stays until make clean.
build/qemu:
	@echo "Fetching QEMU from Debian's testing suite"
	exec tests/fetch/qemu $@

build/linux-guest/packages:
	@echo "Fetching Linux from Debian's stable suite"
	tests/fetch/unpack stable $@ linux-image-cloud-amd64 busybox-static e2fsprogs \
		without initramfs-tools kmod linux-base
	rm -rf $@/lib/modules $@/usr/lib/modules

build/linux-guest/initramfs: tests/fetch/initramfs tests/linux/guest/init $(LINUX_PROGRAMS) | build/linux-guest/packages
	@exec tests/fetch/initramfs build/linux-guest/packages $@ $(LINUX_PROGRAMS)

build/linux-guest/%: tests/linux/guest/%.c
	@mkdir -p $(@D)
	gcc -O2 -Wall -Wextra -static -pthread -o $@ $<

# A flat binary for 0x1000, entered at its first byte.
tests/guests/%.bin: tests/guests/%.S $(wildcard tests/guests/*.h)
	@gcc -m32 -nostdlib -static -no-pie -Wl,--build-id=none,-Ttext=0x1000,--oformat=binary -o $@ $<

# Debian's package names stand for what is looked for: whether it works, wherever it came from.
$(VENV)/demo.stamp $(VENV)/install.stamp $(VENV)/test.stamp: pyproject.toml
	@stop() {
		printf 'make: %s\n' "$$*" >&2
		exit 1
	}
	needed() {
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
		command -v gcc >/dev/null || echo gcc
		test -e /usr/include/stdio.h || echo libc6-dev
	}
	builds_systemd_python() {
		pkg-config --exists libsystemd 2>/dev/null || return
		include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
		test -e "$$include/Python.h"
	}
	wanted() {
		test $(@F) = test.stamp || return 0
		command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86
		builds_systemd_python || echo libsystemd-dev pkg-config python3-dev
		command -v dh >/dev/null || echo debhelper
		dpkg-query --show build-essential >/dev/null 2>&1 || echo build-essential
		for tool in lintian mandoc zsh; do
			command -v $$tool >/dev/null || echo $$tool
		done
	}
	install() {
		echo "Installing $$*"
		export DEBIAN_FRONTEND=noninteractive
		apt="$(APT_INSTALL) --yes -o DPkg::Lock::Timeout=120"
		$$apt "$$@" >/dev/null 2>&1 && return
		log=$$(apt-get update 2>&1 && $$apt "$$@" 2>&1) || printf '%s\n' "$$log" >&2
	}
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
		stop "$(PYTHON) is not Python 3.11 or newer"
	missing=$$(needed)
	optional=$$(wanted)
	if [ "$$missing$$optional" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		test -z "$$missing" || install $$missing
		test -z "$$optional" || install $$optional
		still=$$(needed)
		test -z "$$still" || stop "still missing for $$(command -v $(PYTHON)):" $$still
		missing=
		optional=$$(wanted)
	fi
	test -z "$$missing" || stop these are needed, as root: $(APT_INSTALL) $$missing
	test -z "$$optional" || echo "Without" $$optional "their tests will be skipped; as root: $(APT_INSTALL) $$optional"
	echo "Installing the Python packages into $(VENV)"
	$(VENV)/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	extras=$(filter-out demo,$(basename $(@F)))
	if [ "$$extras" = test ] && builds_systemd_python; then extras=test,log; fi
	$(VENV)/bin/python -m pip install --quiet --no-input --no-cache-dir --disable-pip-version-check --use-pep517 \
		--editable ".$${extras:+[$$extras]}"
	touch $@ $(if $(filter test.stamp,$(@F)),$(VENV)/install.stamp)
