# Sourced with `cache` set: where buildah keeps its images, in place of the machine's own storage.
# Layers that are shared need overlayfs; without it each is a whole copy, and keeping them would take 40 GB.
if [ -z "${STORAGE_DRIVER:-}" ]; then
    STORAGE_DRIVER=$(grep -qw overlay /proc/filesystems && echo overlay || echo vfs)
fi
export STORAGE_DRIVER
layers=$([ "$STORAGE_DRIVER" = overlay ] && echo true || echo false)
buildah() { command buildah --root "$cache/storage" --runroot "$cache/run" "$@"; }
