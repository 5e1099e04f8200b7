# The recipe's order on the first task: wait until the port answers anything, then wait a little, then ask. Only curl's exit code counts.
depends_on() {
  local host=$1 port=$2 status
  status=$(curl -X PUT "http://$host:$port" >/dev/null 2>/dev/null; echo $?)
  while [ "$status" -ne 0 ]; do
    echo "waiting for server ($host:$port)" >&2
    sleep 2
    status=$(curl -X PUT "http://$host:$port" >/dev/null 2>/dev/null; echo $?)
  done
}
depends_on 0.0.0.0 1424
sleep 1
exec "$@"
