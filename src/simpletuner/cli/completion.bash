# bash completion of simpletuner, printed by `simpletuner completion bash`.

_simpletuner_offer() {
    # Adds a name that may contain any characters; compgen -W would execute `$(…)` in it.
    [[ $1 == "$cur"* ]] && COMPREPLY+=("$2$(printf %q "$1")")
}

_simpletuner() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local subcommand='' verbs='' flags='' takes='' positional='' kind='' values='' index name
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "$subcommand/${COMP_WORDS[index]}" in
        @SUBCOMMANDS@) subcommand+=/${COMP_WORDS[index]} ;;
        esac
    done
    # bash splits --flag=value into three words.
    if [[ $cur == = ]]; then
        cur=''
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case "$prev" in
@OF_FLAG@
    esac
    case "$subcommand" in
@OF_SUBCOMMAND@
    esac
    kind=${kind:-$positional}
    if [[ -n $kind && $cur != -* ]]; then
        case $kind in
        words) mapfile -t COMPREPLY < <(compgen -W "$values" -- "$cur") ;;
        file) mapfile -t COMPREPLY < <(compgen -f -- "$cur") && compopt -o filenames 2>/dev/null ;;
        folder) mapfile -t COMPREPLY < <(compgen -d -- "$cur") && compopt -o filenames 2>/dev/null ;;
        env)
            for name in config/*/config.json config/*/config.toml; do
                name=${name%/*}
                [[ -d $name ]] && _simpletuner_offer "${name#config/}"
            done
            ;;
        run)
            for name in output{,/*,/*/*,/*/*/*}/events.jsonl; do
                [[ -e $name ]] && _simpletuner_offer "${name%/*}"
            done
            ;;
        esac
        return 0
    fi
    if [[ $cur != -* && -n $verbs ]]; then
        values=$verbs
    else
        values=$flags
        if [[ $takes == *options* && $cur == -* ]]; then
            values+=' @OPTIONS@'
        fi
    fi
    mapfile -t COMPREPLY < <(compgen -W "$values" -- "$cur")
}

complete -F _simpletuner simpletuner
