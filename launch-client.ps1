# Start Claude Code against the shim; what stands after -- is for claude.
# Finds Python 3.9 or newer and passes every argument on; all else is in qwencode.py.
$ErrorActionPreference = 'Continue'
$program = Join-Path $PSScriptRoot 'qwencode.py'
$newEnough = 'import sys; sys.exit(sys.version_info < (3, 9))'
$names = 'python3', 'python', 'python3.13', 'python3.12', 'python3.11', 'python3.10', 'python3.9', 'py'
# PowerShell takes a bare -- away from a script's arguments; the typed line still has it.
$given = $args
if ($args -notcontains '--' -and $MyInvocation.Line -match 'launch-client(\.ps1)?[''"]?\s+--(\s|$)') {
    $given = @('--') + $args
}
foreach ($name in $names) {
    $found = Get-Command $name -CommandType Application -ErrorAction SilentlyContinue
    $python = $found | Select-Object -First 1
    if (-not $python) { continue }
    $which = @()
    if ($name -eq 'py') { $which = @('-3') }
    & $python.Path @which -c $newEnough 2>&1 | Out-Null
    if ($LASTEXITCODE -ne 0) { continue }
    & $python.Path @which $program 'client' @given
    exit $LASTEXITCODE
}
[Console]::Error.WriteLine('launch-client: Python 3.9 or newer is needed, and python3, python and py are not that.')
[Console]::Error.WriteLine('Install it from https://www.python.org/downloads/ or with: winget install Python.Python.3.13')
exit 127
