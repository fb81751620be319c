#!/usr/bin/env bash
# Trains. Sets everything up on the first start; then it is `simpletuner train` with your arguments.
# Where the working folder has no configuration and none is named, it trains the example that comes with the program;
# without any arguments it also judges what was learned.
set -euo pipefail
# shellcheck source=tools/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/tools/environment.sh"

has_configuration() {
    local argument file
    for argument in "$@"; do
        case $argument in
            --config | --config=* | --env | --env=* | --example | --example=*) return 0 ;;
        esac
    done
    for file in config.json config.toml config/config.json config/config.toml; do
        [ -e "$file" ] && return 0
    done
    return 1
}

# The environment's command, for what is typed next.
say_where_the_command_is() {
    local activate=$venv/bin/activate
    [ "$(command -v simpletuner)" = "$venv/bin/simpletuner" ] && return
    [ "$activate" = "$PWD/.venv/bin/activate" ] && activate=.venv/bin/activate
    say "To type simpletuner in this terminal: source $activate"
}

environment run
if ! has_configuration "$@"; then
    say "No configuration here: training the example tiny-lora. \`simpletuner init\` writes one for your own images."
    "$python" -P -m simpletuner train --example tiny-lora "$@"
    if [ $# = 0 ]; then
        say "Judging what the base and the LoRA draw when asked for things that were never trained on:"
        "$python" "$root/tools/embedded_exam.py" output/tiny-lora
    fi
    say_where_the_command_is
    exit
fi
say_where_the_command_is
# -P: a folder named like a library (datasets, say) must not be taken for it.
exec "$python" -P -m simpletuner train "$@"
