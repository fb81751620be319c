#compdef simpletuner
# Completion of simpletuner for zsh, by `simpletuner completion zsh`.

_simpletuner() {
    local cur=$words[CURRENT] prev=$words[CURRENT-1]
    local place='' verbs='' flags='' takes='' named='' kind='' values='' word
    for word in ${words[2,CURRENT-1]}; do
        case "$place/$word" in
        @PLACES@) place+=/$word ;;
        esac
    done
    if [[ $cur == --*=* ]]; then
        prev=${cur%%=*} cur=${cur#*=}
        compset -P '--*='
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
