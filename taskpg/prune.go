package taskpg

import (
	"errors"
	"iter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// pruneChunk limits the rows that one transaction of Prune deletes.
const pruneChunk = 1000

// Prune implements [task.Pruner]. The table's file does not shrink, but its space is
// reused once the server has vacuumed the table.
func (s *Store) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		limit := bound(before)
		for {
			n := 0
			start := time.Now()
			err := s.transact(time.Now().Add(callLimit), transaction{queue: func(b *pgx.Batch, _ string, again bool) {
				b.Queue(s.sql.Replace(`DELETE FROM {}tasks WHERE seq IN (SELECT seq FROM {}tasks WHERE finished_at IS NOT NULL
					AND finished_at > '-infinity' AND finished_at < $1::text::timestamptz
					ORDER BY finished_at, seq LIMIT $2::bigint FOR UPDATE SKIP LOCKED)`), limit, pruneChunk).
					Exec(func(tag pgconn.CommandTag) error {
						n = int(tag.RowsAffected())
						return nil
					})
			}})
			if errors.Is(err, errFenced) {
				continue // as a new owner
			}
			if n == 0 && err == nil || !yield(n, err) || err != nil {
				return
			}
			time.Sleep(time.Since(start)) // lets others write
		}
	}
}
