# fish completion of simpletuner, printed by `simpletuner completion fish`.

function __simpletuner_complete
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -l subcommand ''
    set -l prev $words[-1]
    set -l before ''
    set -l verbs
    set -l flags
    set -l takes
    set -l positional
    set -l kind
    set -l values
    for word in $words[2..]
        switch "$subcommand/$word"
            case @SUBCOMMANDS@
                set subcommand "$subcommand/$word"
        end
    end
    if string match -qr -- '^--.*=' $cur
        set prev (string replace -r -- '=.*' '' $cur)
        set before "$prev="
        set cur (string replace -r -- '^[^=]*=' '' $cur)
    end
    switch "$prev"
@OF_FLAG@
    end
    switch "$subcommand"
@OF_SUBCOMMAND@
    end
    if test -z "$kind"
        set kind $positional
    end
    if test -n "$kind"; and not string match -q -- '-*' $cur
        switch $kind
            case words
                printf "$before%s\n" $values
            case file
                for path in (__fish_complete_path $cur)
                    echo "$before$path"
                end
            case folder
                for path in (__fish_complete_directories $cur)
                    echo "$before$path"
                end
            case env
                for path in config/*/config.json config/*/config.toml
                    echo "$before"(path basename (path dirname $path))
                end
            case run
                for path in output/events.jsonl output/*/events.jsonl output/*/*/events.jsonl output/*/*/*/events.jsonl
                    test -e $path; and echo "$before"(path dirname $path)
                end
        end
        return
    end
    if not string match -q -- '-*' $cur; and test -n "$verbs"
        printf '%s\n' $verbs
        return
    end
    printf '%s\n' $flags
    if contains options $takes; and string match -q -- '-*' $cur
        printf '%s\n' @OPTIONS@
    end
end

complete -c simpletuner -f -a '(__simpletuner_complete)'
