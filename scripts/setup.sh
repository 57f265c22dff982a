#!/usr/bin/env bash
# Sets up what `make` needs. Run by the Makefile; safe to run again.
#
#   scripts/setup.sh venv      .venv with every pinned dependency and this project in it
#   scripts/setup.sh servers   redis-server, PostgreSQL and RabbitMQ for the tests, with apt-get, where missing and where we may
#
# PYTHON=/path/to/python3.X chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
die() { say "setup: $*"; exit 1; }

# Prints the command prefix that lets us install packages, or fails where we may not.
apt_prefix() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" = 0 ]; then
        echo "env"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        echo "sudo -n env"
    else
        return 1
    fi
}

apt_install() {
    local prefix
    prefix=$(apt_prefix) || return 1
    say "setup: installing $* with apt-get"
    # The word splitting of $prefix is meant.
    # shellcheck disable=SC2086
    $prefix DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || say "setup: apt-get update failed, trying with what is known"
    # shellcheck disable=SC2086
    $prefix DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and ${PYTHON:-python3} is not. Install one, or name it: make setup PYTHON=/path/to/python3.12"
}

# Debian keeps pip out of python3; without python3-venv, and without the right to install it, its wheel is fetched and unpacked.
make_venv_unprivileged() {
    local folder wheel
    folder=$(mktemp -d)
    (cd "$folder" && apt-get download -qq python3-pip-whl && dpkg -x python3-pip-whl_*.deb .) || return 1
    wheel=$(ls "$folder"/usr/share/python-wheels/pip-*.whl)
    "$1" -m venv --clear --without-pip .venv
    .venv/bin/python "$wheel/pip" --disable-pip-version-check install --quiet --no-index "$wheel"
    rm -rf "$folder"
}

make_venv() {
    [ "$(uname -s)" != Darwin ] || say "setup: macOS is not what we test on; Linux is"
    if [ ! -x .venv/bin/python ] || ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        local python version
        python=$(find_python)
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        say "setup: making .venv with $python"
        if can_make_venv "$python" || apt_install "python$version-venv" || apt_install python3-venv; then
            "$python" -m venv --clear .venv
        else
            make_venv_unprivileged "$python" || die "$python cannot make virtual environments. As root: apt-get install python$version-venv"
        fi
    fi
    local pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt)
    # torch first and alone: it is by far the largest, and a build that is already there must satisfy the rest.
    say "setup: installing torch (large: the first time takes a while)"
    "${pip[@]}" torch==2.13.0
    say "setup: installing the other dependencies and this project"
    "${pip[@]}" -e '.[all,dev]'
}

# Is one of these programs there? Debian keeps PostgreSQL's and RabbitMQ's out of PATH.
any_executable() {
    local path
    for path in "$@"; do
        if [ -x "$path" ] || command -v "$path" >/dev/null; then return 0; fi
    done
    return 1
}

install_servers() {
    local missing=()
    any_executable redis-server || missing+=(redis-server)
    any_executable postgres /usr/lib/postgresql/*/bin/postgres || missing+=(postgresql)
    any_executable rabbitmq-server /usr/lib/rabbitmq/bin/rabbitmq-server || missing+=(rabbitmq-server)
    [ ${#missing[@]} -gt 0 ] || return 0
    apt_install "${missing[@]}" ||
        say "setup: could not install ${missing[*]}: the tests that need them will be skipped (and fail where CI is set)"
}

case "${1:-}" in
    venv) make_venv ;;
    servers) install_servers ;;
    *) die "usage: scripts/setup.sh venv|servers" ;;
esac
