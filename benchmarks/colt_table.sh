#!/bin/sh
# Everything behind docs/results/colt.md. The same command goes on after a stop and repeats nothing that is finished.
# REDAN_DATA names the folder of data sets; benchmarks/colt_tables.py FOLDER prints the tables.
#
#   sh benchmarks/colt_table.sh [FOLDER] [SECONDS]       SECONDS: for each image that bounds leave open
out=${1:-runs/colt}
seconds=${2:-10}
. "$(dirname "$0")/once.sh"

# train NAME RECIPE [OPTION]...
train() {
    name=$1
    shift
    once "$name" redan train "$@" --out "$out/$name" $(resumed "$out/$name/recipe.yaml")
}

# judge STEPS NAME: attacked or certified, step by step, on the first 1,000 test images
judge() {
    for step in $1; do
        case $step in
        autoattack)
            once "$2-$step" redan evaluate "$out/$2" --attack autoattack --samples 1000 --no-curve \
                $(resumed "$out/$2"/results/autoattack-*.partial)
            ;;
        *)
            once "$2-$step-$seconds" redan certify "$out/$2" --method "$step" --samples 1000 --timeout "$seconds" \
                --no-curve $(resumed "$out/$2"/certificates/"$step"-*-timeout"$seconds"-*.partial)
            ;;
        esac
    done
}

# row STEPS RECIPE...: each trained and judged
row() {
    steps=$1
    shift
    for recipe in "$@"; do
        train "$recipe" "$recipe"
        judge "$steps" "$recipe"
    done
}

all='autoattack zonotope colt cascade'
row "$all" colt-mnist-mini pgd-at-mnist-mini
row "$all" colt-cifar10-mini pgd-at-cifar10-mini-convmed
# The first phases of ten epochs freeze what has hardly been learned: begin with PGD-AT's thirty, and give it all fifty.
train colt-cifar10-mini-from-pgd-at colt-cifar10-mini -o 'schedule={name: cosine}' \
    -o "method.trained_network=$out/pgd-at-cifar10-mini-convmed"
judge "$all" colt-cifar10-mini-from-pgd-at
train pgd-at-cifar10-mini-convmed-50 pgd-at-cifar10-mini-convmed -o epochs=50
judge "$all" pgd-at-cifar10-mini-convmed-50
# A wider network: is there more to win?
wide='model={name: convmed, w1: 2, w2: 4, hidden: 250}'
most='zonotope cascade autoattack'
train pgd-at-cifar10-mini-convmed-wide pgd-at-cifar10-mini-convmed -o "$wide" -o epochs=15
judge "$most" pgd-at-cifar10-mini-convmed-wide
train colt-cifar10-mini-wide-from-pgd-at colt-cifar10-mini -o "$wide" -o 'schedule={name: cosine}' \
    -o "method.trained_network=$out/pgd-at-cifar10-mini-convmed-wide"
judge "$most colt" colt-cifar10-mini-wide-from-pgd-at
train pgd-at-cifar10-mini-convmed-wide-35 pgd-at-cifar10-mini-convmed -o "$wide" -o epochs=35
judge "$most" pgd-at-cifar10-mini-convmed-wide-35
# What the cascade leaves open of these is little: it brackets their accuracy without AutoAttack.
row 'interval zonotope cascade' ibp-mnist-mini crown-ibp-mnist-mini sabr-mnist-mini mtl-ibp-mnist-mini
# MTL-IBP's recipe trains at twice the radius.
train ibp-mnist-mini-twice ibp-mnist-mini -o method.radius_factor=2
judge 'interval zonotope cascade' ibp-mnist-mini-twice
row 'interval cascade' ibp-mnist-mini-cnn7 crown-ibp-mnist-mini-cnn7 sabr-mnist-mini-cnn7 mtl-ibp-mnist-mini-cnn7
