# Completion of simpletuner for bash, by `simpletuner completion bash`.

_simpletuner_offer() {
    # Adds a name that may hold anything; compgen -W would run what it holds.
    [[ $1 == "$cur"* ]] && COMPREPLY+=("$2$(printf %q "$1")")
}

_simpletuner() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local place='' verbs='' flags='' takes='' named='' kind='' values='' index name
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "$place/${COMP_WORDS[index]}" in
        @PLACES@) place+=/${COMP_WORDS[index]} ;;
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
    case "$place" in
@OF_PLACE@
    esac
    kind=${kind:-$named}
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
