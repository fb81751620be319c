#compdef simpletuner
# zsh completion of simpletuner, printed by `simpletuner completion zsh`.

_simpletuner() {
    local cur=$words[CURRENT] prev=$words[CURRENT-1]
    local subcommand='' verbs='' flags='' takes='' positional='' kind='' values='' word
    for word in ${words[2,CURRENT-1]}; do
        case "$subcommand/$word" in
        @SUBCOMMANDS@) subcommand+=/$word ;;
        esac
    done
    if [[ $cur == --*=* ]]; then
        prev=${cur%%=*} cur=${cur#*=}
        compset -P '--*='
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
        words) compadd -- ${=values} ;;
        file) _files ;;
        folder) _files -/ ;;
        env) compadd -- config/*/config.(json|toml)(N:h:t) ;;
        run) compadd -f -- output/events.jsonl(N:h) output/{*,*/*,*/*/*}/events.jsonl(N:h) ;;
        esac
        return
    fi
    if [[ $cur != -* && -n $verbs ]]; then
        compadd -- ${=verbs}
        return
    fi
    compadd -- ${=flags}
    if [[ $takes == *options* && $cur == -* ]]; then
        compadd -- @OPTIONS@
    fi
}

compdef _simpletuner simpletuner
